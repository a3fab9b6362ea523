//! Does this host's KVM serve stock kernels?
//!
//! `/dev/kvm` alone says little: some hosts have a KVM that emulates every kernel instruction of a guest that was not
//! made for it. Only kvm_amd and kvm_intel run stock kernels.

use std::fmt;
use std::fs::OpenOptions;
use std::path::Path;

/// What was found about the host's KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// It serves: commands run right here.
    Native {
        /// The module behind it.
        module: &'static str,
    },
    /// It does not: commands run in the nested bed.
    Nested {
        /// Why not.
        reason: String,
    },
}

impl Probe {
    /// Looks at this machine.
    pub fn detect() -> Probe {
        Probe::detect_in(Path::new("/sys/module"), Path::new("/dev/kvm"))
    }

    fn detect_in(modules: &Path, device: &Path) -> Probe {
        let module = ["kvm_amd", "kvm_intel"]
            .into_iter()
            .find(|m| modules.join(m).is_dir());
        let opened = OpenOptions::new().read(true).write(true).open(device);
        let device = device.display();
        let reason = match (module, opened) {
            (Some(module), Ok(_)) => return Probe::Native { module },
            (Some(module), Err(e)) => {
                format!("{module} is loaded, but {device} does not open: {e}")
            }
            (None, Ok(_)) => {
                format!("{device} opens, but neither kvm_amd nor kvm_intel is behind it")
            }
            (None, Err(e)) => format!("neither kvm_amd nor kvm_intel is loaded ({device}: {e})"),
        };
        Probe::Nested { reason }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Probe::Native { module } => write!(f, "native: this host's KVM is {module}"),
            Probe::Nested { reason } => write!(f, "nested: {reason}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn only_a_serving_module_with_a_device_that_opens_is_native() {
        let root = std::env::temp_dir().join(format!("outpatch-probe-{}", std::process::id()));
        let (modules, device) = (root.join("module"), root.join("kvm"));
        fs::create_dir_all(modules.join("kvm_pvm")).unwrap();
        fs::write(&device, b"").unwrap();
        let text = |p: Probe| p.to_string();
        let found = text(Probe::detect_in(&modules, &device));
        assert!(
            found.starts_with("nested") && found.contains("neither"),
            "{found}"
        );
        fs::create_dir(modules.join("kvm_intel")).unwrap();
        let found = Probe::detect_in(&modules, &device);
        assert_eq!(
            found,
            Probe::Native {
                module: "kvm_intel"
            }
        );
        let found = text(Probe::detect_in(&modules, &root.join("none")));
        assert!(found.contains("does not open"), "{found}");
        fs::remove_dir_all(&root).unwrap();
    }
}
