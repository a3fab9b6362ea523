//! The boot loader with made-up bzImages: what it checks, and where it loads the parts.

use std::io::Write;

use super::*;

const LOAD: u64 = 16 * MIB;

/// A file in the temporary directory, removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, bytes: &[u8]) -> Scratch {
        let path =
            std::env::temp_dir().join(format!("outpatch-boot-{}-{name}", std::process::id()));
        File::create(&path).unwrap().write_all(bytes).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A bzImage with two setup sectors and a body of 4 KiB.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 3 * 512 + 4096];
    let mut put =
        |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]);
    put(0x1f4, &256_u32.to_le_bytes());
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[LOADED_HIGH]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &XLF_KERNEL_64.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &LOAD.to_le_bytes());
    put(0x260, &0x20_0000_u32.to_le_bytes());
    put(3 * 512, b"KERNEL");
    image
}

fn memory(mib: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
}

/// The message with its causes, as the command line prints it.
fn message(error: BootError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

fn open_error(name: &str, image: &[u8]) -> String {
    let file = Scratch::new(name, image);
    message(Kernel::open(&file.0).unwrap_err())
}

#[test]
fn kernel_initrd_and_command_line_go_where_the_zero_page_says() {
    let memory = memory(64);
    let kernel = Scratch::new("good", &bzimage());
    let initrd = Scratch::new("initrd", &[0x5a; 5000]);
    let mut kernel = Kernel::open(&kernel.0).unwrap();
    let entry = kernel
        .load(
            &memory,
            Some(Initrd::open(&initrd.0).unwrap()),
            "console=ttyS0 quiet",
            GuestAddress(0xe_0000),
        )
        .unwrap();
    assert_eq!(entry.0, LOAD + 0x200);
    let mut body = [0; 6];
    memory.read_slice(&mut body, GuestAddress(LOAD)).unwrap();
    assert_eq!(&body, b"KERNEL");
    let params: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    let (ramdisk, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    assert_eq!(size, 5000);
    assert_eq!(ramdisk % 4096, 0);
    let mut back = vec![0; 5000];
    memory
        .read_slice(&mut back, GuestAddress(ramdisk.into()))
        .unwrap();
    assert!(back.iter().all(|byte| *byte == 0x5a));
    let mut cmdline = [0; 20];
    memory
        .read_slice(
            &mut cmdline,
            GuestAddress({ params.hdr.cmd_line_ptr }.into()),
        )
        .unwrap();
    assert_eq!(&cmdline, b"console=ttyS0 quiet\0");
    assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
    let table = params.e820_table;
    let map: Vec<_> = table
        .iter()
        .take(params.e820_entries.into())
        .map(|e| (e.addr, e.size, { e.r#type }))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, 63 << 20, 1)
        ]
    );
}

#[test]
fn wrong_files_are_named_and_distinguished() {
    assert!(open_error("empty", b"").contains("not a bzImage"));
    assert!(open_error("text", &[b'x'; 4096]).contains("not a bzImage"));
    let mut old = bzimage();
    old[0x206] = 0x0b;
    assert!(open_error("old", &old).contains("2.11"));
    let mut narrow = bzimage();
    narrow[0x236] = 0;
    assert!(open_error("narrow", &narrow).contains("no 64-bit entry"));
    let whole = bzimage();
    for cut in [0x26c, 3 * 512, whole.len() - 1] {
        assert!(
            open_error("cut", &whole[..cut]).contains("truncated"),
            "{cut}"
        );
    }
    let missing = message(Kernel::open(Path::new("/no/such/kernel")).unwrap_err());
    assert!(missing.contains("/no/such/kernel") && missing.contains("No such file"));
    assert!(message(Kernel::open(Path::new("/")).unwrap_err()).contains("not a regular file"));
}

fn load_error(mib: usize, initrd: Option<&Path>, cmdline: &str, name: &str) -> BootError {
    let file = Scratch::new(name, &bzimage());
    let initrd = initrd.map(|path| Initrd::open(path).unwrap());
    Kernel::open(&file.0)
        .unwrap()
        .load(&memory(mib), initrd, cmdline, GuestAddress(0))
        .unwrap_err()
}

#[test]
fn too_little_memory_for_the_kernel_is_noticed_before_there_is_any() {
    let file = Scratch::new("tiny", &bzimage());
    let kernel = Kernel::open(&file.0).unwrap();
    let line = |has| kernel.check_memory(has).unwrap_err().to_string();
    let needs = "of memory is too little: this kernel needs at least 19 MiB";
    assert_eq!(line(64 << 10), format!("64 KiB {needs}"));
    assert_eq!(line(0), format!("0 KiB {needs}"));
    assert_eq!(line(18 * MIB), format!("18 MiB {needs}"));
    kernel.check_memory(19 * MIB).unwrap();
}

#[test]
fn what_does_not_fit_is_refused() {
    assert!(matches!(
        load_error(17, None, "", "small"),
        BootError::TooLittleMemory { initrd: false, .. }
    ));
    let big = Scratch::new("big", &vec![0; 20 << 20]);
    let error = load_error(32, Some(&big.0), "", "small-initrd");
    assert_eq!(
        error.to_string(),
        "32 MiB of memory is too little: this kernel with this initrd needs at least 39 MiB"
    );
    assert!(matches!(
        load_error(32, None, &"x".repeat(2048), "long"),
        BootError::CommandLineTooLong { max: 2047, .. }
    ));
    assert!(matches!(
        load_error(32, None, "a\0b", "nul"),
        BootError::BadCommandLine
    ));
    let missing = message(Initrd::open(Path::new("/no/such/initrd")).unwrap_err());
    assert!(
        missing.starts_with("cannot read initrd /no/such/initrd: "),
        "{missing}"
    );
}
