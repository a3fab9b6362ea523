//! Bad input: one clear line, a non-zero exit status, and no effect on the guest.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, Reply, one_line_refusal};

use crate::harness::fixture::Fixture;
use crate::harness::scenario::Scenario;

/// What is told, all at once, of a patch with obstacles of many kinds.
const OBSTACLES: [&str; 7] = [
    "the patch is refused for 6 reasons",
    "section .data..percpu (for function new_cmdline_proc_show) is not supported yet",
    "the module's init function would not run: it stores to",
    "the module's exit function would not run: it calls",
    "callbacks (pre_patch = pre_patch)",
    "the guest kernel has no symbol outpatch_no_such_function",
    "unknown symbol outpatch_no_such_export: the guest kernel does not export it (used by \
     new_cmdline_proc_show)",
];

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::new("refusals::command_line", command_line)]
}

/// Files that are not a livepatch for this guest are refused.
pub fn modules(fixture: &Fixture, guest: &mut Guest, generation: &str) -> Result<()> {
    let kernel = fixture.kernel(generation)?;
    let other = fixture.kernel(if generation == "6.1" { "6.12" } else { "6.1" })?;
    let folder = fixture.sockets();
    let good = fs::read(kernel.patch("livepatch-sample")?)?;
    let truncated = write(&folder, "truncated.ko", &good[..good.len() / 2])?;
    let header = write(&folder, "header.ko", &good[..40])?;
    let text = write(
        &folder,
        "text.ko",
        b"this is not an ELF file, it is a line of text\n",
    )?;
    let empty = write(&folder, "empty.ko", b"")?;
    let stripped = stripped(&folder, &good)?;
    let outpatch = guest.outpatch().clone();
    outpatch.ok(&["ps"])?;
    let before = outpatch.json(&["status"])?;
    let log = guest.dmesg()?;
    let cases = [
        ("not an ELF", text.as_str(), "ELF"),
        ("an empty file", empty.as_str(), "empty.ko"),
        ("a truncated file", truncated.as_str(), "truncated"),
        ("a stripped file", stripped.as_str(), "strip -s"),
        ("a file cut in its header", header.as_str(), "header.ko"),
        (
            "not a livepatch",
            kernel.patch("not-livepatch")?,
            "livepatch",
        ),
        (
            "another kernel's vermagic",
            other.patch("livepatch-sample")?,
            "vermagic",
        ),
        (
            "a function that is not in this kernel",
            kernel.patch("unknown-function")?,
            "outpatch_no_such_function",
        ),
        (
            "a symbol that is not in this kernel",
            kernel.patch("unknown-symbol")?,
            "outpatch_no_such_export",
        ),
        (
            "a function with too few symbols of its name",
            kernel.patch("wrong-sympos")?,
            "cmdline_proc_show",
        ),
        ("callbacks", kernel.patch("callbacks")?, "callbacks"),
        (
            "per-CPU variables",
            kernel.patch("percpu")?,
            "per-CPU variables",
        ),
        (
            "a function of a module",
            kernel.patch("module-object")?,
            "module",
        ),
        (
            "an init function that sets a value",
            kernel.patch("init-value")?,
            "it stores to limit",
        ),
        (
            "an exit function that waits",
            kernel.patch("exit-work")?,
            "it calls rcu_barrier",
        ),
        (
            "static keys of its own",
            kernel.patch("features")?,
            "the static key own_",
        ),
        (
            "no such file",
            "/nonexistent/patch.ko",
            "/nonexistent/patch.ko",
        ),
    ];
    for (what, file, expected) in cases {
        let line = outpatch.refused(&["apply", file]).context(what)?;
        ensure!(
            line.contains(expected),
            "{what}: {expected:?} is not in {line:?}"
        );
        println!("{generation}: {what}: {line}");
    }
    let line = outpatch.refused(&["apply", kernel.patch("obstacles")?])?;
    for expected in OBSTACLES {
        ensure!(line.contains(expected), "{expected:?} is not in {line:?}");
    }
    println!("{generation}: {line}");
    let status = outpatch.json(&["status"])?;
    ensure!(
        status["patches"] == before["patches"],
        "a refused patch is in the status: {status}"
    );
    outpatch.refused(&["revert", "no_such_patch"])?;
    outpatch.refused(&["stack", "99999"])?;
    guest.expect_unharmed(&log)?;
    // After all this a good patch still applies, compressed as distributions ship modules.
    outpatch.ok(&["apply", &compressed(&folder, &good)?])?;
    ensure!(
        guest
            .sh("cat /proc/cmdline")?
            .contains("this has been live patched"),
        "the good patch has no effect"
    );
    outpatch.refused(&["apply", kernel.patch("livepatch-sample")?])?;
    outpatch.ok(&["revert", "livepatch_sample"])?;
    guest.expect_unharmed(&log)
}

/// The module without its symbols, as `strip -s` leaves it.
fn stripped(folder: &Path, module: &[u8]) -> Result<String> {
    let path = write(folder, "stripped.ko", module)?;
    let status = Command::new("strip").args(["-s", &path]).status()?;
    ensure!(status.success(), "strip: {status}");
    Ok(path)
}

fn compressed(folder: &Path, module: &[u8]) -> Result<String> {
    let path = write(folder, "good.ko", module)?;
    let status = Command::new("gzip").args(["-f", &path]).status()?;
    ensure!(status.success(), "gzip: {status}");
    Ok(path + ".gz")
}

fn write(folder: &Path, name: &str, content: &[u8]) -> Result<String> {
    let path = folder.join(name);
    fs::write(&path, content).with_context(|| path.display().to_string())?;
    Ok(path
        .to_str()
        .context("a path that is not UTF-8")?
        .to_owned())
}

/// `outpatch run` with wrong arguments is refused.
fn command_line(fixture: &Fixture) -> Result<()> {
    let stock = fixture.kernel("6.12")?;
    let kernel = stock.bzimage.to_str().context("path")?;
    let initrd = stock.initrd.to_str().context("path")?;
    let folder = fixture.sockets();
    let taken = folder.join("taken.sock");
    let _listener = UnixListener::bind(&taken)?;
    let taken = taken.to_str().context("path")?;
    let text = write(
        &folder,
        "text.img",
        b"neither a kernel nor anything else that boots, but long enough to have a header\n",
    )?;
    let image = fs::read(&stock.bzimage)?;
    let half = write(&folder, "half.img", &image[..image.len() / 2])?;
    let plain = ["--cpus", "1", "--memory", "256M"];
    let long = "x".repeat(5000);
    let missing = ("/nonexistent/vmlinuz", "/nonexistent/initrd");
    let with = |option, value| [&plain[..], &[option, value]].concat();
    let sized = |cpus, memory| vec!["--cpus", cpus, "--memory", memory];
    let cases = [
        (
            "no kernel file",
            (missing.0, initrd),
            plain.to_vec(),
            missing.0,
        ),
        (
            "no initrd file",
            (kernel, missing.1),
            plain.to_vec(),
            missing.1,
        ),
        ("not a bzImage", (&text, initrd), plain.to_vec(), "text.img"),
        (
            "a truncated bzImage",
            (&half, initrd),
            plain.to_vec(),
            "half.img",
        ),
        ("0 vCPUs", (kernel, initrd), sized("0", "256M"), "cpus"),
        (
            "1000 vCPUs",
            (kernel, initrd),
            sized("1000", "256M"),
            "1000",
        ),
        (
            "no memory size",
            (kernel, initrd),
            sized("1", "lots"),
            "lots",
        ),
        (
            "too little memory",
            (kernel, initrd),
            sized("1", "1M"),
            "memory",
        ),
        (
            "socket in use",
            (kernel, initrd),
            with("--socket", taken),
            "taken.sock",
        ),
        (
            "a long command line",
            (kernel, initrd),
            with("--append", &long),
            "command line",
        ),
    ];
    for (what, (kernel, initrd), options, expected) in cases {
        let out = Command::new(&fixture.assets.binary)
            .args(["run", "--kernel", kernel, "--initrd", initrd])
            .args(options)
            .stdin(Stdio::null())
            .output()?;
        let line = one_line_refusal(what, &Reply::from(&out))?;
        ensure!(
            line.contains(expected),
            "{what}: {expected:?} is not in {line:?}"
        );
        println!("{what}: {line}");
    }
    let no_socket = Command::new(&fixture.assets.binary)
        .args(["ps", "--socket", "/nonexistent/guest.sock"])
        .output()?;
    let reply = Reply::from(&no_socket);
    ensure!(
        one_line_refusal("no socket", &reply)?.contains("/nonexistent/guest.sock"),
        "{reply:?}"
    );
    // A mount namespace whose /dev is empty: the host's own stays as it is. A user other than root
    // needs a user namespace for it.
    let id = Command::new("id").arg("-u").output()?.stdout;
    let user: &[&str] = match id.trim_ascii() {
        b"0" => &[],
        _ => &["--user", "--map-root-user"],
    };
    let bare = Command::new("unshare")
        .args(user)
        .args(["--mount", "--propagation", "unchanged"])
        .args(["sh", "-c", "mount -t tmpfs none /dev && exec \"$@\"", "sh"])
        .arg(&fixture.assets.binary)
        .args(["run", "--kernel", kernel, "--initrd", initrd])
        .args(plain)
        .output()?;
    let line = one_line_refusal("no /dev/kvm", &Reply::from(&bare))?;
    ensure!(
        line.contains("/dev/kvm"),
        "the line does not name /dev/kvm: {line}"
    );
    Ok(())
}
