#![no_main]

libfuzzer_sys::fuzz_target!(init: introspect_fuzz::prepare(), |data: &[u8]| {
    introspect_fuzz::bounded("kallsyms", || introspect_fuzz::kallsyms(data));
});
