//! A bzImage, an initial RAM disk and a command line into guest memory, as `Documentation/arch/x86/boot.rst` wants them.
//!
//! The bzImage is booted as it is: its own decompressor runs in the guest and with it the guest's own KASLR. The files are
//! checked before anything is believed of them; a wrong one is an error with its name, not a guest that hangs.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;

/// Where the setup header lies in the file, and the end of what we use of it.
const HEADER: usize = 0x1f1;
const HEADER_END: usize = 0x26c;
const MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.12 brought `xloadflags`.
const OLDEST_PROTOCOL: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry, from the start of the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// "Undefined" in the registry of boot loaders.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{what} {}", path.display())]
    File {
        /// Kernel or initrd.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Not a bzImage.
    #[error("kernel {}: not a bzImage ({why})", path.display())]
    NotBzImage {
        /// Which file.
        path: PathBuf,
        /// How that shows.
        why: &'static str,
    },
    /// A bzImage, but of a kernel that has no 64-bit entry.
    #[error("kernel {}: {why}; a 64-bit kernel with boot protocol 2.12 or later is needed", path.display())]
    NotBootable {
        /// Which file.
        path: PathBuf,
        /// How that shows.
        why: String,
    },
    /// The file ends before the kernel does.
    #[error("kernel {}: truncated: {has} bytes of {wants}", path.display())]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// Length of the file.
        has: u64,
        /// Length that its header announces.
        wants: u64,
    },
    /// The RAM does not hold kernel and initrd.
    #[error("{} MiB of memory is too little: this kernel{} needs at least {} MiB", has / MIB, if *initrd { " with this initrd" } else { "" }, needs.div_ceil(MIB))]
    TooLittleMemory {
        /// RAM of the guest.
        has: u64,
        /// RAM that loading needs.
        needs: u64,
        /// Whether there is an initrd.
        initrd: bool,
    },
    /// The command line does not fit this kernel.
    #[error("the command line has {has} bytes, this kernel takes {takes}")]
    CommandLineTooLong {
        /// Its length.
        has: usize,
        /// The most that the kernel takes.
        takes: u32,
    },
    /// The command line has a NUL or something else that is not a character of a command line.
    #[error("the command line may have printable ASCII characters only")]
    BadCommandLine,
    /// Guest memory is not where it should be.
    #[error("guest memory: {0}")]
    Memory(String),
}

/// A kernel file whose header was checked.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    header: setup_header,
}

impl Kernel {
    /// Opens and checks a bzImage.
    ///
    /// # Errors
    /// [`BootError`] about the file.
    pub fn open(path: &Path) -> Result<Kernel, BootError> {
        let io = |source| BootError::File {
            what: "kernel",
            path: path.to_owned(),
            source,
        };
        let not = |why| BootError::NotBzImage {
            path: path.to_owned(),
            why,
        };
        let mut file = open_file(path).map_err(io)?;
        let has = file.metadata().map_err(io)?.len();
        let mut start = [0; HEADER_END];
        file.read_exact(&mut start).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => not("the file is too short"),
            _ => io(e),
        })?;
        let raw = start.get(HEADER..).unwrap_or_default();
        let mut header = setup_header::default();
        let target = vm_memory::ByteValued::as_mut_slice(&mut header);
        for (to, from) in target.iter_mut().zip(raw) {
            *to = *from;
        }
        if { header.header } != MAGIC {
            return Err(not("it has no `HdrS`"));
        }
        let unbootable = |why| BootError::NotBootable {
            path: path.to_owned(),
            why,
        };
        let version = { header.version };
        if version < OLDEST_PROTOCOL {
            return Err(unbootable(format!(
                "its boot protocol is {}.{:02}",
                version >> 8,
                version & 0xff
            )));
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Err(not("it is a zImage"));
        }
        if { header.xloadflags } & XLF_KERNEL_64 == 0 {
            return Err(unbootable("it has no 64-bit entry".to_owned()));
        }
        let wants = setup_size(&header) + u64::from(header.syssize) * 16;
        if has < wants {
            return Err(BootError::Truncated {
                path: path.to_owned(),
                has,
                wants,
            });
        }
        Ok(Kernel {
            path: path.to_owned(),
            file,
            header,
        })
    }

    /// Where the kernel goes: where it would rather be, so that it need not move itself first.
    fn load_address(&self) -> u64 {
        self.header.pref_address
    }

    /// End of the memory that the kernel uses before it reads the memory map.
    fn end(&self) -> u64 {
        let file = self
            .load_address()
            .saturating_add(u64::from(self.header.syssize) * 16);
        let run = self
            .load_address()
            .saturating_add(u64::from(self.header.init_size));
        file.max(run)
    }

    /// Puts kernel, `initrd` and `cmdline` into `memory`, and the zero page that says where they are and where the ACPI
    /// tables are. Gives the entry point.
    ///
    /// # Errors
    /// [`BootError`].
    pub fn load(
        &mut self,
        memory: &GuestMemoryMmap,
        initrd: Option<&Path>,
        cmdline: &str,
        rsdp: GuestAddress,
    ) -> Result<GuestAddress, BootError> {
        let initrd = initrd.map(Initrd::open).transpose()?;
        let place = self.place(memory, initrd.as_ref())?;
        self.write_cmdline(memory, cmdline)?;
        let loaded = self.write_kernel(memory)?;
        let mut params = boot_params {
            hdr: loaded.setup_header.unwrap_or(self.header),
            acpi_rsdp_addr: rsdp.0,
            ..Default::default()
        };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.cmd_line_ptr = low_address(layout::CMDLINE.0)?;
        if let (Some(mut initrd), Some(at)) = (initrd, place) {
            initrd.read_into(memory, at)?;
            params.hdr.ramdisk_image = low_address(at)?;
            params.hdr.ramdisk_size = low_address(initrd.len)?;
        }
        write_e820(&mut params, memory);
        memory
            .write_obj(params, layout::ZERO_PAGE)
            .map_err(memory_error)?;
        Ok(GuestAddress(loaded.kernel_load.0 + ENTRY_64))
    }

    /// Where the initrd goes: as high as RAM and kernel allow, away from where the kernel unpacks itself.
    fn place(
        &self,
        memory: &GuestMemoryMmap,
        initrd: Option<&Initrd>,
    ) -> Result<Option<u64>, BootError> {
        let low_end = memory
            .find_region(GuestAddress(0))
            .map_or(0, GuestMemoryRegion::len);
        let has: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        let initrd_len = initrd.map_or(0, |initrd| initrd.len);
        let needs = self.end().saturating_add(initrd_len.saturating_add(PAGE));
        let too_little = BootError::TooLittleMemory {
            has,
            needs,
            initrd: initrd.is_some(),
        };
        if low_end < needs {
            return Err(too_little);
        }
        if initrd.is_none() {
            return Ok(None);
        }
        let top = low_end.min(u64::from(self.header.initrd_addr_max).saturating_add(1));
        match top.checked_sub(initrd_len).map(|at| at & !(PAGE - 1)) {
            Some(at) if at >= self.end() => Ok(Some(at)),
            _ => Err(too_little),
        }
    }

    fn write_cmdline(&self, memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), BootError> {
        if !cmdline
            .chars()
            .all(|c| c.is_ascii_graphic() || c == ' ' || c == '\t')
        {
            return Err(BootError::BadCommandLine);
        }
        let takes = self.header.cmdline_size;
        if u32::try_from(cmdline.len()).is_ok_and(|len| len <= takes) {
            let mut bytes = cmdline.as_bytes().to_vec();
            bytes.push(0);
            memory
                .write_slice(&bytes, layout::CMDLINE)
                .map_err(memory_error)
        } else {
            Err(BootError::CommandLineTooLong {
                has: cmdline.len(),
                takes,
            })
        }
    }

    fn write_kernel(&mut self, memory: &GuestMemoryMmap) -> Result<KernelLoaderResult, BootError> {
        let at = GuestAddress(self.load_address());
        BzImage::load(memory, Some(at), &mut self.file, Some(layout::HIGH_MEMORY)).map_err(|e| {
            BootError::NotBootable {
                path: self.path.clone(),
                why: e.to_string(),
            }
        })
    }
}

/// Length of the real-mode part, which is not loaded.
fn setup_size(header: &setup_header) -> u64 {
    let sectors = if header.setup_sects == 0 {
        4
    } else {
        header.setup_sects
    };
    (u64::from(sectors) + 1) * 512
}

/// An initial RAM disk; what is in it is the kernel's business.
#[derive(Debug)]
struct Initrd {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Initrd {
    fn open(path: &Path) -> Result<Initrd, BootError> {
        let open = || {
            let mut file = open_file(path)?;
            let len = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(0))?;
            Ok((file, len))
        };
        let (file, len) = open().map_err(|source| BootError::File {
            what: "initrd",
            path: path.to_owned(),
            source,
        })?;
        Ok(Initrd {
            path: path.to_owned(),
            file,
            len,
        })
    }

    fn read_into(&mut self, memory: &GuestMemoryMmap, at: u64) -> Result<(), BootError> {
        let len = usize::try_from(self.len).unwrap_or(usize::MAX);
        memory
            .read_exact_volatile_from(GuestAddress(at), &mut self.file, len)
            .map_err(|e| BootError::File {
                what: "initrd",
                path: self.path.clone(),
                source: io::Error::other(e),
            })
    }
}

/// Opens a regular file; a directory opens too, and then says something unhelpful when read.
fn open_file(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}

fn write_e820(params: &mut boot_params, memory: &GuestMemoryMmap) {
    let mut map = vec![
        (0, layout::LOW_MEMORY_END.0, E820_RAM),
        (
            layout::LOW_MEMORY_END.0,
            layout::HIGH_MEMORY.0 - layout::LOW_MEMORY_END.0,
            E820_RESERVED,
        ),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY.0);
        let end = region.start_addr().0 + region.len();
        if end > start {
            map.push((start, end - start, E820_RAM));
        }
    }
    let mut table = params.e820_table;
    let mut entries = 0;
    for (slot, (addr, size, type_)) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: type_,
        };
        entries += 1;
    }
    params.e820_table = table;
    params.e820_entries = entries;
}

fn low_address(value: u64) -> Result<u32, BootError> {
    u32::try_from(value).map_err(|_| BootError::Memory(format!("{value:#x} is not below 4 GiB")))
}

fn memory_error(error: vm_memory::GuestMemoryError) -> BootError {
    BootError::Memory(error.to_string())
}

#[cfg(test)]
mod tests;
