#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    introspect_fuzz::capped("orc", || introspect_fuzz::orc(data));
});
