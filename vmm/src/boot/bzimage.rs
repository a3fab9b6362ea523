//! Loads a bzImage, an initrd and a command line into guest memory as
//! `Documentation/arch/x86/boot.rst` requires.
//!
//! The bzImage is booted as it is: its own decompressor, and with it the guest's own KASLR, runs in
//! the guest. The files are checked before their contents are used; a wrong file is an error with
//! its name, not a guest that hangs.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;
use introspect::x86::PAGE_SIZE;

/// Where the setup header is in the file, and the end of the part that is used here.
const HEADER: usize = 0x1f1;
const HEADER_END: usize = 0x26c;
const MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.12, the first with `xloadflags`.
const MIN_PROTOCOL: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
/// Offset of the 64-bit entry point from the start of the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// The boot loader id for an unregistered boot loader.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const MIB: u64 = 1 << 20;

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be read.
    #[error("cannot read {what} {}", path.display())]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The file is not a bzImage.
    #[error("kernel {}: not a bzImage ({why})", path.display())]
    NotBzImage {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The file is a bzImage of a kernel that has no 64-bit entry point.
    #[error(
        "kernel {}: {why}; a 64-bit kernel with boot protocol 2.12 or later is needed",
        path.display()
    )]
    NotBootable {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file is shorter than its header announces.
    #[error(
        "kernel {} is truncated: it has {has} bytes, and its header announces {needed}",
        path.display()
    )]
    Truncated {
        /// Path of the file.
        path: PathBuf,
        /// Length of the file in bytes.
        has: u64,
        /// Length in bytes that its header announces.
        needed: u64,
    },
    /// The guest's RAM is too small for the kernel and the initrd.
    #[error(
        "{} of memory is too little: this kernel{} needs at least {} MiB",
        size_of(has),
        if *initrd { " with this initrd" } else { "" },
        needs.div_ceil(MIB)
    )]
    TooLittleMemory {
        /// The guest's RAM in bytes.
        has: u64,
        /// The RAM that loading needs, in bytes.
        needs: u64,
        /// Whether there is an initrd.
        initrd: bool,
    },
    /// The command line is longer than this kernel accepts.
    #[error("the command line has {has} bytes; this kernel accepts at most {max}")]
    CommandLineTooLong {
        /// Length of the command line in bytes.
        has: usize,
        /// The most bytes that the kernel accepts.
        max: u32,
    },
    /// The command line has a NUL or another byte that is not printable ASCII.
    #[error("the command line may have printable ASCII characters only")]
    BadCommandLine,
    /// Guest memory is missing at an address that loading writes to.
    #[error("guest memory: {0}")]
    Memory(String),
}

/// `512 MiB`; less than 1 MiB in KiB.
fn size_of(bytes: &u64) -> String {
    match bytes / MIB {
        0 => format!("{} KiB", bytes / 1024),
        mib => format!("{mib} MiB"),
    }
}

/// A bzImage whose header was checked.
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
        let mut file = open_file(path).map_err(io)?;
        let has = file.metadata().map_err(io)?.len();
        let mut start = [0; HEADER_END];
        file.read_exact(&mut start).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => BootError::NotBzImage {
                path: path.to_owned(),
                why: "the file is too short",
            },
            _ => io(e),
        })?;
        let raw = start.get(HEADER..).unwrap_or_default();
        let mut header = setup_header::default();
        let target = vm_memory::ByteValued::as_mut_slice(&mut header);
        for (to, from) in target.iter_mut().zip(raw) {
            *to = *from;
        }
        check_header(path, &header, has)?;
        Ok(Kernel {
            path: path.to_owned(),
            file,
            header,
        })
    }

    /// The kernel's load address: the one that it prefers, so that it need not relocate itself
    /// first.
    fn load_address(&self) -> u64 {
        self.header.pref_address
    }

    /// The end of the memory that the kernel uses before it reads the memory map.
    fn end(&self) -> u64 {
        let file = self
            .load_address()
            .saturating_add(u64::from(self.header.syssize) * 16);
        let run = self
            .load_address()
            .saturating_add(u64::from(self.header.init_size));
        file.max(run)
    }

    /// Checks that the kernel itself fits in `has` bytes of RAM. With less than 1 MiB there would
    /// not even be memory for what the guest finds there first, such as the ACPI tables.
    ///
    /// # Errors
    /// [`BootError::TooLittleMemory`].
    pub fn check_memory(&self, has: u64) -> Result<(), BootError> {
        let needs = self.end().saturating_add(PAGE_SIZE);
        if has < needs {
            return Err(BootError::TooLittleMemory {
                has,
                needs,
                initrd: false,
            });
        }
        Ok(())
    }

    /// Writes the kernel, `initrd` and `cmdline` to `memory`, and the zero page with their
    /// addresses and that of the ACPI tables (`rsdp`). Returns the kernel's 64-bit entry point.
    ///
    /// # Errors
    /// [`BootError`].
    pub fn load(
        &mut self,
        memory: &GuestMemoryMmap,
        initrd: Option<Initrd>,
        cmdline: &str,
        rsdp: GuestAddress,
    ) -> Result<GuestAddress, BootError> {
        let initrd_at = self.place_initrd(memory, initrd.as_ref())?;
        self.write_cmdline(memory, cmdline)?;
        let loaded = self.write_kernel(memory)?;
        let mut params = boot_params {
            hdr: loaded.setup_header.unwrap_or(self.header),
            acpi_rsdp_addr: rsdp.0,
            ..Default::default()
        };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.cmd_line_ptr = low_address(layout::CMDLINE.0)?;
        if let (Some(mut initrd), Some(at)) = (initrd, initrd_at) {
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

    /// Checks that the RAM is large enough, and chooses the initrd's address: as high as the RAM
    /// and the kernel's limit allow, away from where the kernel decompresses itself. `None`: no
    /// initrd.
    fn place_initrd(
        &self,
        memory: &GuestMemoryMmap,
        initrd: Option<&Initrd>,
    ) -> Result<Option<u64>, BootError> {
        let low_end = memory
            .find_region(GuestAddress(0))
            .map_or(0, GuestMemoryRegion::len);
        let has: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        let initrd_len = initrd.map_or(0, |initrd| initrd.len);
        let needs = self
            .end()
            .saturating_add(initrd_len.saturating_add(PAGE_SIZE));
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
        match top.checked_sub(initrd_len).map(|at| at & !(PAGE_SIZE - 1)) {
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
        let max = self.header.cmdline_size;
        if u32::try_from(cmdline.len()).is_ok_and(|len| len <= max) {
            let mut bytes = cmdline.as_bytes().to_vec();
            bytes.push(0);
            memory
                .write_slice(&bytes, layout::CMDLINE)
                .map_err(memory_error)
        } else {
            Err(BootError::CommandLineTooLong {
                has: cmdline.len(),
                max,
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

/// Checks the setup header of the file at `path`, which has `has` bytes.
fn check_header(path: &Path, header: &setup_header, has: u64) -> Result<(), BootError> {
    let not = |why| BootError::NotBzImage {
        path: path.to_owned(),
        why,
    };
    let unbootable = |why| BootError::NotBootable {
        path: path.to_owned(),
        why,
    };
    if { header.header } != MAGIC {
        return Err(not("it has no `HdrS`"));
    }
    let version = { header.version };
    if version < MIN_PROTOCOL {
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
    let needed = setup_size(header) + u64::from(header.syssize) * 16;
    if has < needed {
        return Err(BootError::Truncated {
            path: path.to_owned(),
            has,
            needed,
        });
    }
    Ok(())
}

/// Length in bytes of the real-mode part, which is not loaded.
fn setup_size(header: &setup_header) -> u64 {
    let sectors = if header.setup_sects == 0 {
        4
    } else {
        header.setup_sects
    };
    (u64::from(sectors) + 1) * 512
}

/// An initrd file. Its contents are not checked: only the kernel knows their format.
#[derive(Debug)]
pub struct Initrd {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Initrd {
    /// Opens an initrd.
    ///
    /// # Errors
    /// [`BootError::File`].
    pub fn open(path: &Path) -> Result<Initrd, BootError> {
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

/// Opens a regular file. The type is checked before the file is opened: the open of a FIFO waits for
/// a process that writes to it, and some devices act on being opened. A directory would open as
/// well, and then fail with a misleading error when read.
fn open_file(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path)?.is_file() {
        File::open(path)
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
