//! Our own small static programs in C, which the gcc of the host's packages compiles. They are cached by their
//! source.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::cache::{At, Cache, CacheError, fingerprint};
use crate::host::error::ToolError;
use crate::host::tools;

/// Why a program could not be built.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The compiler is missing on this host.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The compiler reported errors.
    #[error("{name} does not compile: {stderr}")]
    Compile {
        /// The program's name.
        name: String,
        /// The compiler's standard error.
        stderr: String,
    },
    /// The cache folder could not be read or written.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// A program of `guests/programs`. Its source is part of this library, so that the library can be
/// used from any folder.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// The program's name, without `.c`.
    pub name: &'static str,
    /// The C source.
    pub text: &'static str,
}

/// The init program of the nested test bed.
pub const BED_INIT: Program = Program {
    name: "bed-init",
    text: include_str!("../../programs/bed-init.c"),
};

/// What is preloaded into the file server of the nested test bed.
pub const BED_SERVER: Program = Program {
    name: "bed-server",
    text: include_str!("../../programs/bed-server.c"),
};

/// The programs that every guest's initramfs has in `/bin`.
pub const GUEST_PROGRAMS: [Program; 7] = [
    Program {
        name: "churn",
        text: include_str!("../../programs/churn.c"),
    },
    Program {
        name: "bpf",
        text: include_str!("../../programs/bpf.c"),
    },
    Program {
        name: "spin",
        text: include_str!("../../programs/spin.c"),
    },
    Program {
        name: "kexec",
        text: include_str!("../../programs/kexec.c"),
    },
    Program {
        name: "kinds",
        text: include_str!("../../programs/kinds.c"),
    },
    Program {
        name: "sleeper",
        text: include_str!("../../programs/sleeper.c"),
    },
    Program {
        name: "hammer",
        text: include_str!("../../programs/hammer.c"),
    },
];

/// Compiles a program, or finds it in the cache. Returns its path.
pub fn build(cache: &Cache, program: &Program) -> Result<PathBuf, ProgramError> {
    compile(cache, program, "", &["-static"])
}

/// Compiles a library that is loaded into programs of the host, or finds it in the cache. Returns
/// its path, which ends in `.so`.
pub fn build_library(cache: &Cache, library: &Program) -> Result<PathBuf, ProgramError> {
    compile(cache, library, ".so", &["-shared", "-fPIC"])
}

fn compile(
    cache: &Cache,
    program: &Program,
    extension: &str,
    kind: &[&str],
) -> Result<PathBuf, ProgramError> {
    let name = program.name;
    let hash = fingerprint([program.text.as_bytes()]);
    let path = cache
        .root()
        .join(format!("programs/{name}-{hash}{extension}"));
    if path.is_file() {
        return Ok(path);
    }
    tools::require(&tools::COMPILER)?;
    let staging = cache.stage()?;
    let source = staging.path().join("program.c");
    let binary = staging.path().join("program");
    fs::write(&source, program.text).at(&source)?;
    let output = tools::builder("gcc", staging.path(), None)
        .args(kind)
        .args(["-O2", "-Wall", "-Werror", "-o"])
        .args([&binary, &source])
        .output()
        .at(Path::new("gcc"))?;
    if !output.status.success() {
        return Err(ProgramError::Compile {
            name: name.to_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    staging.publish(&binary, &path)?;
    Ok(path)
}
