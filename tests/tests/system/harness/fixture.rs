//! What a scenario is given inside the bed: the assets, a scratch folder, and guests.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use guests::drive::{Guest, GuestSpec, MEMORY_MIB};
use guests::kernel::prepared::PreparedKernel;

use crate::harness::assets::Assets;
use crate::harness::guest_counts::{self, Event};
use crate::harness::kept_cores;

/// The resources of one scenario, inside the bed.
#[derive(Debug)]
pub struct Fixture {
    /// What the host made.
    pub assets: Assets,
    scratch: PathBuf,
}

impl Fixture {
    /// Reads the description of the assets from `file`, which lies in the scratch folder.
    pub fn load(file: &Path) -> Result<Fixture> {
        let text = fs::read(file).with_context(|| file.display().to_string())?;
        let assets = serde_json::from_slice(&text)?;
        let scratch = file.parent().context("the file is in no folder")?;
        let scratch = scratch.to_owned();
        Ok(Fixture { assets, scratch })
    }

    /// The kernel of this name: a generation, or what the scenario added.
    pub fn kernel(&self, name: &str) -> Result<&PreparedKernel> {
        self.assets.kernel(name)
    }

    /// A folder that the host sees as well.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// A folder inside the bed that this scenario may write to; the guests' sockets are in it.
    pub fn sockets(&self) -> PathBuf {
        env::temp_dir()
    }

    /// Boots a guest with the default amount of memory. A guest that is lost before its shell
    /// answers is reported and counted, and its boot is tried once more.
    pub fn boot(&self, kernel: &str, cpus: u32, append: &str) -> Result<Guest> {
        self.boot_with(kernel, cpus, MEMORY_MIB, append)
    }

    /// Like [`boot`](Self::boot), with another amount of memory.
    pub fn boot_with(
        &self,
        kernel: &str,
        cpus: u32,
        memory_mib: u32,
        append: &str,
    ) -> Result<Guest> {
        let append = append.to_owned();
        let vmm = &self.assets.binary;
        self.boot_under(vmm, kernel, (cpus, memory_mib), append)
    }

    /// Like [`boot_with`](Self::boot_with), with the program `vmm` as the VMM instead of
    /// `outpatch`.
    pub fn boot_under(
        &self,
        vmm: &Path,
        kernel: &str,
        (cpus, memory_mib): (u32, u32),
        append: String,
    ) -> Result<Guest> {
        let prepared = self.kernel(kernel)?;
        let spec = GuestSpec {
            binary: self.assets.binary.clone(),
            vmm: vmm.to_owned(),
            kernel: prepared.bzimage.clone(),
            initrd: prepared.initrd.clone(),
            cpus,
            memory_mib,
            append,
        };
        let first = self.try_boot(&spec);
        match first {
            Ok(guest) => Ok(guest),
            Err(error) => {
                println!(
                    "LOST a {kernel} guest with {cpus} vCPUs while it booted, once more: {error:#}"
                );
                self.try_boot(&spec)
            }
        }
    }

    fn try_boot(&self, spec: &GuestSpec) -> Result<Guest> {
        guest_counts::count(&self.scratch, Event::Boot)?;
        let booted = Guest::boot(spec, &self.sockets());
        if booted.is_err() {
            guest_counts::count(&self.scratch, Event::Lost)?;
        }
        booted
    }

    /// Runs `body` on the guest and powers it off. If `body` fails and the guest is gone, this is
    /// counted; if the guest is still there, its core is kept when the environment requests it.
    pub fn with(
        &self,
        mut guest: Guest,
        body: impl FnOnce(&mut Guest) -> Result<()>,
    ) -> Result<()> {
        if let Err(error) = body(&mut guest) {
            if !guest.is_running() {
                guest_counts::count(&self.scratch, Event::Lost)?;
            } else if kept_cores::are_kept() {
                let core = self.scratch.join(kept_cores::OF_A_FAILURE);
                // The failure of the scenario is reported, not one of this.
                let _ = guest.outpatch().call(&["dump", &core.to_string_lossy()]);
            }
            return Err(error);
        }
        let status = guest.poweroff()?;
        ensure!(
            status.success(),
            "after poweroff the VMM ended with {status}"
        );
        Ok(())
    }
}
