#![no_main]

libfuzzer_sys::fuzz_target!(init: hostile_guest::prepare(), |data: &[u8]| {
    hostile_guest::bounded("core_file", || hostile_guest::core_file(data));
});
