//! The `key=value` strings of a module's `.modinfo`.

use crate::module::error::ModuleError;
use crate::module::file::elf::{ElfFile, text};

/// `include/linux/module.h: MODULE_NAME_LEN`.
const MAX_MODULE_NAME: usize = 56;

/// The values of `.modinfo` that loading needs.
#[derive(Clone, Debug)]
pub(in crate::module) struct Modinfo {
    pub name: String,
    pub vermagic: String,
    pub license: String,
    /// The modules that it depends on, separated by commas.
    pub depends: String,
    /// Symbol namespaces that the module imports.
    pub namespaces: Vec<String>,
}

impl Modinfo {
    /// Reads and checks them, as `kernel/module/main.c: check_modinfo` and `setup_load_info` do.
    pub fn read(file: &ElfFile) -> Result<Modinfo, ModuleError> {
        let strings = strings(file);
        let all = |key: &str| {
            strings
                .iter()
                .filter_map(|s| s.strip_prefix(key)?.strip_prefix('='))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let first = |key: &'static str| all(key).into_iter().next();
        // The kernel only checks that the key exists.
        if first("livepatch").is_none() {
            return Err(ModuleError::NotLivepatch);
        }
        let name = first("name")
            .filter(|name| {
                !name.is_empty()
                    && name.len() < MAX_MODULE_NAME
                    && name
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"_-+.".contains(&b))
            })
            .ok_or(ModuleError::Modinfo("name"))?;
        Ok(Modinfo {
            name,
            vermagic: first("vermagic").ok_or(ModuleError::Modinfo("vermagic"))?,
            depends: first("depends").unwrap_or_default(),
            license: first("license").unwrap_or_else(|| "unspecified".into()),
            namespaces: all("import_ns"),
        })
    }

    /// Whether the license is one of `include/linux/license.h: license_is_gpl_compatible`.
    pub fn is_gpl_compatible(&self) -> bool {
        matches!(
            self.license.as_str(),
            "GPL"
                | "GPL v2"
                | "GPL and additional rights"
                | "Dual BSD/GPL"
                | "Dual MIT/GPL"
                | "Dual MPL/GPL"
        )
    }
}

fn strings(file: &ElfFile) -> Vec<String> {
    let data = file
        .find(".modinfo")
        .map(|(_, section)| file.data(section))
        .unwrap_or_default();
    data.split_inclusive(|&b| b == 0)
        .filter_map(|s| text(s, 4096))
        .filter(|s| !s.is_empty())
        .collect()
}
