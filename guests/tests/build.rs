//! Test of building livepatch modules on a host that has, lacks or sets what the build must not
//! depend on.
//!
//! The modules are built in a process of their own, with an environment, a umask and a cache folder
//! that break builds which take anything from them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use guests::host::cache::Cache;
use guests::kernel::{Flavour, Generation, Kernel, patches};

/// Set in the process that builds.
const INSIDE: &str = "OUTPATCH_TEST_BUILD";
/// One kernel whose compiler is the host's, and one whose compiler comes from a newer Debian.
const GENERATIONS: [Generation; 2] = [Generation::V6_12, Generation::V7_3];
/// Programs that builds of the kernel look for, or that others like to install or wrap.
const STAND_INS: &str = "pahole gcc cc g++ c++ cpp ld as ar nm objcopy objdump readelf strip make \
    gmake gcc-12 gcc-14 x86_64-linux-gnu-gcc x86_64-linux-gnu-gcc-12 x86_64-linux-gnu-gcc-14 \
    x86_64-linux-gnu-ld x86_64-linux-gnu-objcopy clang ld.lld llvm-objcopy ccache sh bash dash \
    perl python python3 awk gawk mawk sed grep egrep find sort xargs cat mkdir rm mv ln cp touch \
    test expr uname dirname basename readlink realpath stat cmp bc tar xz gzip dpkg dpkg-deb \
    dpkg-architecture apt-get apt-cache apt-config git env setpriv unshare flex bison rustc";
/// Variables that make, Kbuild, the compiler, the linker, shells and tar read.
const VARIABLES: [(&str, &str); 34] = [
    ("CFLAGS", "-fhostile"),
    ("KCFLAGS", "-fhostile"),
    ("KCPPFLAGS", "-fhostile"),
    ("KAFLAGS", "-fhostile"),
    ("HOSTCFLAGS", "-fhostile"),
    ("CPPFLAGS", "-fhostile"),
    ("LDFLAGS", "--hostile"),
    ("CC", "/nonexistent/cc"),
    ("HOSTCC", "/nonexistent/cc"),
    ("LD", "/nonexistent/ld"),
    ("PAHOLE", "/nonexistent/pahole"),
    ("ARCH", "sparc"),
    ("SUBARCH", "sparc"),
    ("CROSS_COMPILE", "sparc-linux-gnu-"),
    ("LLVM", "1"),
    ("MAKEFLAGS", "-n --no-builtin-rules"),
    ("GNUMAKEFLAGS", "-n"),
    ("MAKEFILES", "/nonexistent/makefile"),
    ("MAKELEVEL", "7"),
    ("KBUILD_OUTPUT", "/nonexistent"),
    ("KBUILD_EXTMOD", "/nonexistent"),
    ("O", "/nonexistent"),
    ("W", "e123"),
    ("DEBIAN_KERNEL_USE_CCACHE", "1"),
    ("CPATH", "/nonexistent"),
    ("GCC_EXEC_PREFIX", "/nonexistent/"),
    ("COMPILER_PATH", "/nonexistent"),
    ("TMPDIR", "/nonexistent"),
    ("TAR_OPTIONS", "--hostile"),
    ("CDPATH", "/:/usr"),
    ("LC_ALL", "tr_TR.UTF-8"),
    ("LANGUAGE", "tr"),
    ("http_proxy", "http://127.0.0.1:9"),
    ("HTTPS_PROXY", "http://127.0.0.1:9"),
];

/// A folder, deleted when dropped.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn build_all(cache: &Cache) -> Vec<PathBuf> {
    let build = |generation| {
        let kernel = Kernel::fetch(cache, generation, Flavour::Cloud).unwrap();
        patches::build(cache, &kernel, patches::SAMPLE).unwrap()
    };
    GENERATIONS.map(build).to_vec()
}

/// Writes programs that note in a file that they were called, and fail. Returns that file.
fn write_stand_ins(folder: &Path) -> PathBuf {
    let calls = folder.join("calls");
    for name in STAND_INS.split_whitespace() {
        let path = folder.join(name);
        let script = format!(
            "#!/bin/sh\necho {name} \"$@\" >> '{}'\nexit 99\n",
            calls.display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    calls
}

/// Makes a cache that has the packages and sources of `cache`, but nothing that was built.
fn with_packages_of(cache: &Cache, folder: &Path) {
    fs::copy(
        cache.root().join("packages.json"),
        folder.join("packages.json"),
    )
    .unwrap();
    let sources = GENERATIONS.map(|generation| format!("sources/{generation}/samples/livepatch"));
    for below in ["libraries".to_owned()].into_iter().chain(sources) {
        fs::create_dir_all(folder.join(&below)).unwrap();
        for entry in fs::read_dir(cache.root().join(&below)).unwrap().flatten() {
            fs::copy(entry.path(), folder.join(&below).join(entry.file_name())).unwrap();
        }
    }
}

#[test]
fn modules_build_whatever_the_host_has_and_its_environment_says() {
    let cache = Cache::open().unwrap();
    let built = build_all(&cache);
    if std::env::var_os(INSIDE).is_some() {
        for module in built {
            assert!(fs::read(&module).unwrap().starts_with(b"\x7fELF"));
            println!("module: {}", module.display());
        }
        return;
    }
    let folder = Folder(
        cache
            .root()
            .join(format!("test, it's % {}", std::process::id())),
    );
    let (programs, other) = (folder.0.join("stand ins"), folder.0.join("a cache"));
    fs::create_dir_all(&programs).unwrap();
    fs::create_dir_all(&other).unwrap();
    let calls = write_stand_ins(&programs);
    with_packages_of(&cache, &other);

    let path = std::env::var("PATH").unwrap();
    let output = Command::new("/bin/sh")
        .args(["-c", "umask 077; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--nocapture", "--test-threads=1"])
        .env_remove("HOME")
        .env("PATH", format!("{}:{path}", programs.display()))
        .env("OUTPATCH_CACHE", &other)
        .env(INSIDE, "1")
        .envs(VARIABLES)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let modules = stdout.lines().filter(|line| line.contains("module: "));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(modules.count(), GENERATIONS.len(), "{stdout}\n{stderr}");
    let calls = fs::read_to_string(calls).unwrap_or_default();
    assert_eq!(calls, "", "programs of the caller's PATH were run");
    let made = Cache::at(&other).unwrap().for_make().unwrap();
    fs::remove_dir_all(made.root()).unwrap();
}
