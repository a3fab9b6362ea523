#![no_main]

libfuzzer_sys::fuzz_target!(init: hostile_guest::prepare(), |data: &[u8]| {
    hostile_guest::bounded("types", || hostile_guest::types(data));
});
