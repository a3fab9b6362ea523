#![no_main]

libfuzzer_sys::fuzz_target!(init: hostile_guest::prepare(), |data: &[u8]| {
    hostile_guest::bounded("orc", || hostile_guest::orc(data));
});
