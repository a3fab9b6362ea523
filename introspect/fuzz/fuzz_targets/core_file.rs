#![no_main]

libfuzzer_sys::fuzz_target!(init: introspect_fuzz::prepare(), |data: &[u8]| {
    introspect_fuzz::bounded("core_file", || introspect_fuzz::core_file(data));
});
