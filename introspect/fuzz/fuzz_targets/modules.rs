#![no_main]

libfuzzer_sys::fuzz_target!(init: introspect_fuzz::prepare(), |data: &[u8]| {
    introspect_fuzz::bounded("modules", || introspect_fuzz::modules(data));
});
