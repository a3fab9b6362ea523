//! Builds a kernel without `CONFIG_LIVEPATCH`. Debian has none, so a small one is built from the
//! source of a stock kernel.
//!
//! Its tree stays in the cache, as patches are built against it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::debian::packages::Packages;
use crate::host::cache::{Cache, fingerprint};
use crate::host::{progress, tools};
use crate::initramfs::Initramfs;
use crate::kernel::Generation;
use crate::kernel::headers::Headers;
use crate::kernel::patches;
use crate::kernel::prepared::PreparedKernel;

/// Its configuration; all other options are off.
const CONFIG: &str = include_str!("../../kernels/no-livepatch.config");

/// The programs and files that building a kernel needs, each with its Debian package.
const TOOLS: [(&str, &str); 9] = [
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
    ("pahole", "pahole"),
    ("/usr/include/gelf.h", "libelf-dev"),
];

/// Prepares such a kernel with these patches. The first time it is built, which takes some minutes.
///
/// # Errors
/// When the source cannot be fetched or does not build.
pub fn prepare(generation: Generation, patches: &[&str]) -> Result<PreparedKernel> {
    let cache = Cache::open()?;
    let name = format!("linux-source-{generation}");
    let source = Packages::new(&cache).fetch(&name, generation.suites())?;
    let hash = fingerprint([source.version.as_bytes(), CONFIG.as_bytes()]);
    let tree = cache
        .for_make()?
        .root()
        .join(format!("no-livepatch/{generation}-{hash}"));
    if !tree.is_dir() {
        let archive = source.root.join(format!("usr/src/{name}.tar.xz"));
        build(&cache, &archive, &tree)?;
    }
    let release = fs::read_to_string(tree.join("include/config/kernel.release"))?;
    let release = release.trim();
    let headers = Headers {
        folder: tree.clone(),
        libraries: OsString::new(),
        compiler: None,
    };
    let mut initramfs = Initramfs::new();
    let mut built = BTreeMap::new();
    for name in patches {
        let module = patches::build_against(&cache, (release, &hash), &headers, name)?;
        initramfs = initramfs.with_file(&format!("/lib/patches/{name}.ko"), &module);
        built.insert((*name).to_owned(), Ok(module));
    }
    Ok(PreparedKernel {
        release: release.to_owned(),
        bzimage: tree.join("arch/x86/boot/bzImage"),
        initrd: initramfs.build(&cache)?,
        patches: built,
    })
}

fn build(cache: &Cache, archive: &Path, tree: &Path) -> Result<()> {
    tools::require(&TOOLS)?;
    let _lock = cache.lock("no-livepatch")?;
    if tree.is_dir() {
        return Ok(());
    }
    let bar = progress::spinner("building a kernel without CONFIG_LIVEPATCH");
    let staging = cache.for_make()?.stage()?;
    let folder = staging.path();
    let mut unpack = tools::builder("tar", folder, None);
    unpack
        .arg("-xJf")
        .arg(archive)
        .args(["--strip-components=1", "-C"]);
    run(unpack.arg(folder))?;
    let wanted = folder.join("wanted.config");
    File::create(&wanted)?.write_all(CONFIG.as_bytes())?;
    let mut configure = make(folder);
    configure.env("KCONFIG_ALLCONFIG", &wanted);
    run(configure.arg("allnoconfig"))?;
    check_config(&folder.join(".config"))?;
    run(make(folder).args(["bzImage", "modules"]))?;
    bar.finish_and_clear();
    Ok(staging.commit(tree)?)
}

fn make(folder: &Path) -> Command {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut command = tools::builder("make", folder, None);
    command.arg(format!("-j{jobs}")).arg("-C").arg(folder);
    command
}

/// Checks that the options that outpatch needs are on, and that livepatching is off.
fn check_config(path: &Path) -> Result<()> {
    let config = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let has = |line: &str| config.lines().any(|other| other == line);
    for needed in [
        "CONFIG_DEBUG_INFO_BTF=y",
        "CONFIG_UNWINDER_ORC=y",
        "CONFIG_DYNAMIC_FTRACE=y",
        "CONFIG_KALLSYMS_ALL=y",
        "CONFIG_RANDOMIZE_BASE=y",
        "CONFIG_SMP=y",
        "CONFIG_MODULES=y",
    ] {
        ensure!(has(needed), "the kernel would lack {needed}");
    }
    ensure!(
        !has("CONFIG_LIVEPATCH=y"),
        "the kernel would have CONFIG_LIVEPATCH"
    );
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let command_line = tools::command_line(command);
    let output = command.output().with_context(|| command_line.clone())?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let mut last: Vec<&str> = stderr.lines().rev().take(12).collect();
    last.reverse();
    ensure!(
        output.status.success(),
        "{command_line}: {}",
        last.join("; ")
    );
    Ok(())
}
