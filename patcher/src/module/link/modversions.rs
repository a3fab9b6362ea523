//! Checks that a module was built for this kernel, by the kernel's own rules: vermagic, the size of
//! `struct module`, symbol versions (modversions).
//!
//! This module follows `kernel/module/version.c` and `kernel/module/main.c: check_modinfo`.

use std::collections::HashMap;

use crate::module::error::LinkError;
use crate::module::file::LivepatchModule;
use crate::module::file::elf::text;
use crate::module::file::sections::THIS_MODULE;
use crate::module::kernel::{Export, Layouts, ModversionLayout, TargetKernel};

/// The versions of the symbols that a module uses, to be compared with the kernel's.
pub(in crate::module) struct Modversions<'a> {
    module: &'a LivepatchModule,
    kernel_vermagic: String,
    /// The CRCs in `__versions`, by symbol.
    table: HashMap<String, u64>,
}

impl<'a> Modversions<'a> {
    /// Reads the versions, and checks everything that does not depend on single symbols.
    pub fn check<T: TargetKernel + ?Sized>(
        module: &'a LivepatchModule,
        target: &T,
        layouts: &Layouts,
    ) -> Result<Modversions<'a>, LinkError> {
        let file = &module.file;
        let modversions = Modversions {
            module,
            kernel_vermagic: target.vermagic()?,
            table: layouts
                .modversion
                .and_then(|layout| {
                    let (_, section) = file.find("__versions")?;
                    table(file.data(section), layout)
                })
                .unwrap_or_default(),
        };
        let module_layout = target.export("module_layout")?;
        let has_modversions = module_layout.as_ref().is_some_and(|e| e.crc.is_some())
            && !modversions.table.is_empty();
        if !same_magic(
            &module.info.vermagic,
            &modversions.kernel_vermagic,
            has_modversions,
        ) {
            return Err(modversions.mismatch(None));
        }
        if let Some(export) = module_layout {
            modversions.check_symbol("module_layout", &export)?;
        }
        let own = file
            .find(THIS_MODULE)
            .map_or(0, |(_, section)| section.size);
        if own != layouts.module_size {
            return Err(LinkError::ModuleStruct {
                module: own,
                kernel: layouts.module_size,
            });
        }
        Ok(modversions)
    }

    /// Checks one symbol, as `check_version` does. A missing version is an error, as in Debian's
    /// kernels.
    pub fn check_symbol(&self, name: &str, export: &Export) -> Result<(), LinkError> {
        let Some(crc) = export.crc else {
            return Ok(());
        };
        match self.table.get(name) {
            None => Err(LinkError::NoVersion(name.to_owned())),
            Some(own) if *own == u64::from(crc) => Ok(()),
            Some(_) => Err(self.mismatch(Some(name))),
        }
    }

    fn mismatch(&self, symbol: Option<&str>) -> LinkError {
        LinkError::Vermagic {
            module: self.module.info.vermagic.trim_end().to_owned(),
            kernel: self.kernel_vermagic.trim_end().to_owned(),
            symbol: symbol.map(str::to_owned),
        }
    }
}

/// The entries of `__versions`; the first counts when a name has several.
fn table(bytes: &[u8], layout: ModversionLayout) -> Option<HashMap<String, u64>> {
    let size = usize::try_from(layout.size).ok().filter(|&size| size > 0)?;
    let at_name = usize::try_from(layout.name).ok()?;
    let at_crc = usize::try_from(layout.crc).ok()?;
    let mut out = HashMap::new();
    for entry in bytes.chunks_exact(size) {
        let crc = u64::from_le_bytes(*entry.get(at_crc..)?.first_chunk::<8>()?);
        if let Some(name) = text(entry.get(at_name..)?, size) {
            out.entry(name).or_insert(crc);
        }
    }
    Some(out)
}

/// Compares vermagics as the kernel's `same_magic` does: with modversions, the release (the first
/// word) does not count.
fn same_magic(module: &str, kernel: &str, has_modversions: bool) -> bool {
    let tail = |magic: &str| {
        magic
            .find(' ')
            .and_then(|at| magic.get(at..))
            .unwrap_or_default()
            .to_owned()
    };
    if has_modversions {
        tail(module) == tail(kernel)
    } else {
        module == kernel
    }
}

#[cfg(test)]
mod tests {
    use super::same_magic;

    #[test]
    fn with_modversions_the_release_does_not_count() {
        let (a, b) = ("1.2-a SMP modversions ", "1.2-b SMP modversions ");
        assert!(same_magic(a, a, false));
        assert!(!same_magic(a, b, false));
        assert!(same_magic(a, b, true));
        assert!(!same_magic(a, "1.2-a SMP preempt modversions ", true));
    }
}
