//! Our own small static programs in C, compiled by the host's gcc and cached by their source.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::host::cache::{At, Cache, CacheError, fingerprint};
use crate::host::error::ToolError;
use crate::host::tools;

/// Why a program could not be built.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// No compiler.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The compiler refused.
    #[error("{name} does not compile: {stderr}")]
    Compile {
        /// The program.
        name: String,
        /// The compiler's words.
        stderr: String,
    },
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// The source of a program of `guests/programs`, carried in this library so that it works from any place.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// What the program is called.
    pub name: &'static str,
    /// Its C source.
    pub text: &'static str,
}

/// The first process of the test bed.
pub const BED_INIT: Program = Program {
    name: "bed-init",
    text: include_str!("../../programs/bed-init.c"),
};

/// The programs that every initramfs has in its `/bin`.
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

/// Compiles a program, or finds it compiled.
pub fn build(cache: &Cache, source: &Program) -> Result<PathBuf, ProgramError> {
    let name = source.name;
    let mark = fingerprint([source.text.as_bytes()]);
    let place = cache.root().join(format!("programs/{name}-{mark}"));
    if place.is_file() {
        return Ok(place);
    }
    tools::require(&[("gcc", "gcc libc6-dev")])?;
    let staging = cache.stage()?;
    let (code, program) = (
        staging.path().join("program.c"),
        staging.path().join("program"),
    );
    fs::write(&code, source.text).at(&code)?;
    let output = Command::new("gcc")
        .args(["-static", "-O2", "-Wall", "-Werror", "-o"])
        .args([&program, &code])
        .stdin(Stdio::null())
        .output()
        .at(Path::new("gcc"))?;
    if !output.status.success() {
        return Err(ProgramError::Compile {
            name: name.to_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    staging.publish(&program, &place)?;
    Ok(place)
}
