//! `outpatch run` before it has a guest: these tests need no KVM.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use vmm::api::testing::TempDir;

use crate::{Bench, outpatch, refused};

/// Runs `outpatch run`, which must end by itself.
fn run(args: &[&str]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_outpatch"))
        .arg("run")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it hangs: {args:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

/// The start of a bzImage that is all header.
fn kernel(dir: &Path) -> String {
    let mut image = vec![0; 2048];
    let mut put =
        |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &1_u16.to_le_bytes());
    let path = dir.join("kernel");
    std::fs::write(&path, image).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_fifo_for_a_kernel_or_an_initrd_is_refused_at_once() {
    let dir = TempDir::new();
    let fifo = dir.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let fifo = fifo.to_str().unwrap();
    let socket = dir.path().join("vm.sock");
    let kernel = kernel(dir.path());
    for (what, args) in [
        ("kernel", &["--kernel", fifo][..]),
        ("initrd", &["--kernel", &kernel, "--initrd", fifo]),
    ] {
        let output = run(&[args, &["--socket", socket.to_str().unwrap()]].concat());
        assert_eq!(
            String::from_utf8(output.stderr).unwrap(),
            format!("outpatch: cannot read {what} {fifo}: not a regular file\n")
        );
        assert_eq!(output.status.code(), Some(1));
        assert!(!socket.exists());
    }
}

#[test]
fn too_little_memory_is_called_that() {
    let bench = Bench::new();
    let mut image = vec![0; 3 * 512 + 4096];
    for (offset, bytes) in [
        (0x1f1, &[2][..]),
        (0x1f4, &256_u32.to_le_bytes()),
        (0x1fe, &[0x55, 0xaa]),
        (0x202, b"HdrS"),
        (0x206, &[0x0f, 2]),
        (0x211, &[1]),
        (0x236, &[1, 0]),
        (0x258, &(16_u64 << 20).to_le_bytes()),
        (0x260, &(2_u32 << 20).to_le_bytes()),
    ] {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    let kernel = bench.file("bzImage", &image);
    let socket = bench.dir.path().join("run.sock");
    for (size, has) in [("64K", "64 KiB"), ("1M", "1 MiB"), ("0", "0 KiB")] {
        let line = refused(
            &outpatch(&socket, &["run", "--kernel", &kernel, "--memory", size]),
            1,
        );
        assert_eq!(
            line,
            format!("outpatch: {has} of memory is too little: this kernel needs at least 19 MiB\n")
        );
    }
}

#[test]
fn a_second_vmm_does_not_take_the_socket() {
    let bench = Bench::new();
    let line = refused(&bench.run(&["run", "--kernel", "/nowhere"]), 1);
    assert!(line.contains("is in use by a running VMM"), "{line}");
    assert_eq!(bench.ok(&["resume"]), "running\n");
}
