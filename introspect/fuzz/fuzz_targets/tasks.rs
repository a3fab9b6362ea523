#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    introspect_fuzz::capped("tasks", || introspect_fuzz::tasks(data));
});
