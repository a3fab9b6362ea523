//! Finds modules in an unpacked kernel package, decompresses them, and orders them for loading.
//!
//! `modules.dep` is created when a package is installed, which ours are not: the dependencies are
//! read from the modules themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::host::cache::{At, CacheError};

/// Why a module could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The package does not have it.
    #[error("no module {name} below {folder}", folder = .folder.display())]
    NotFound {
        /// The module's name.
        name: String,
        /// The folder that was searched.
        folder: PathBuf,
    },
    /// The module or the folder could not be read.
    #[error(transparent)]
    Io(#[from] CacheError),
}

/// A module, not compressed.
#[derive(Debug)]
pub struct Module {
    /// The file's name, with `.ko`.
    pub file: String,
    /// The content of the ELF file.
    pub content: Vec<u8>,
}

/// Reads the modules `names` from the tree `folder`, and the modules that they depend on. Each
/// comes after its dependencies.
pub fn with_dependencies(folder: &Path, names: &[&str]) -> Result<Vec<Module>, ModuleError> {
    let mut paths = BTreeMap::new();
    collect(folder, &mut paths)?;
    let mut ordered = Vec::new();
    let mut seen = BTreeSet::new();
    // Each module is visited twice: first to queue its dependencies, then to be added after them.
    let mut waiting: Vec<(String, Option<Module>)> =
        names.iter().rev().map(|n| (normalize(n), None)).collect();
    while let Some((name, read_before)) = waiting.pop() {
        if let Some(module) = read_before {
            ordered.push(module);
            continue;
        }
        if !seen.insert(name.clone()) {
            continue;
        }
        let path = paths.get(&name).ok_or_else(|| ModuleError::NotFound {
            name: name.clone(),
            folder: folder.to_owned(),
        })?;
        let content = read(path)?;
        let needed = dependencies(&content);
        let file = format!("{name}.ko");
        waiting.push((name, Some(Module { file, content })));
        waiting.extend(needed.into_iter().rev().map(|n| (n, None)));
    }
    Ok(ordered)
}

/// A module's name with `_` for `-`, which are equivalent.
fn normalize(name: &str) -> String {
    name.replace('-', "_")
}

/// The paths of all modules below `folder`, by name.
fn collect(folder: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<(), CacheError> {
    let mut waiting = vec![folder.to_owned()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder).at(&folder)?.flatten() {
            let kind = entry.file_type().at(&entry.path())?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if kind.is_dir() {
                waiting.push(entry.path());
            } else if let Some((stem, "" | ".xz" | ".gz")) = name.split_once(".ko") {
                found.insert(normalize(stem), entry.path());
            }
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, CacheError> {
    let raw = fs::read(path).at(path)?;
    let mut plain = Vec::new();
    match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => liblzma::read::XzDecoder::new(raw.as_slice()).read_to_end(&mut plain),
        Some("gz") => flate2::read::GzDecoder::new(raw.as_slice()).read_to_end(&mut plain),
        _ => return Ok(raw),
    }
    .at(path)?;
    Ok(plain)
}

/// The names in the `depends=` entry of the module's `.modinfo`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = module.get(start + KEY.len()..).unwrap_or_default();
    let value = value.split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|d| !d.is_empty())
        .map(normalize)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let folder = std::env::temp_dir().join(format!("outpatch-modules-{}", std::process::id()));
        fs::create_dir_all(folder.join("deep")).unwrap();
        fs::write(folder.join("deep/top.ko"), b"x\0depends=mid-one,base\0y").unwrap();
        fs::write(folder.join("mid_one.ko"), b"\0depends=base\0").unwrap();
        fs::write(folder.join("base.ko"), b"\0depends=\0").unwrap();
        let found = with_dependencies(&folder, &["top", "base"]).unwrap();
        let names: Vec<&str> = found.iter().map(|m| m.file.as_str()).collect();
        assert_eq!(names, ["base.ko", "mid_one.ko", "top.ko"]);
        let error = with_dependencies(&folder, &["other"]).unwrap_err();
        assert!(error.to_string().contains("no module other"));
        fs::remove_dir_all(&folder).unwrap();
    }
}
