//! Detects whether this host's KVM runs stock kernels.
//!
//! That `/dev/kvm` exists is not enough: some hosts have a KVM that emulates every instruction of a
//! guest kernel that was not built for it. Only kvm_amd and kvm_intel run stock kernels.

use std::fmt;
use std::fs::OpenOptions;
use std::path::Path;

/// Whether the host's KVM runs stock kernels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// It does: commands run directly on the host.
    Native {
        /// The KVM module: `kvm_amd` or `kvm_intel`.
        module: &'static str,
    },
    /// It does not: commands run in the nested bed.
    Nested {
        /// Why the host's KVM is not used.
        reason: String,
    },
}

impl Probe {
    /// Examines this host.
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
                format!("{device} opens, but neither kvm_amd nor kvm_intel is loaded")
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
    fn native_needs_kvm_amd_or_kvm_intel_and_a_device_that_opens() {
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
