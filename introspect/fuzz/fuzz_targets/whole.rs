#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    introspect_fuzz::capped("whole", || introspect_fuzz::whole(data));
});
