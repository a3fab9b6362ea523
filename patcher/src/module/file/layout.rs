//! [`SectionLayout`]: the offset of each section in the three regions, code, constants and data,
//! that a patch gets in the guest. It is made before the addresses of the regions are known.

use introspect::Gva;

use crate::module::error::{LinkError, ModuleError};
use crate::module::file::elf::Section;
use crate::module::file::sections::Placement;

/// The most bytes of one region: far more than a hidden window has.
const MAX_REGION: u64 = 16 << 20;
/// The largest alignment of a section, in bytes: a page.
const MAX_ALIGN: u64 = 4096;

/// How much memory a region needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSize {
    /// Its length in bytes; 0 when the module has nothing for it.
    pub len: u64,
    /// The alignment that it needs; a power of two, at most 4096.
    pub align: u64,
}

/// How much memory a module needs in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Code.
    pub code: RegionSize,
    /// Constants, and tables that are never written.
    pub rodata: RegionSize,
    /// Data, and the tables and structures that the guest writes.
    pub data: RegionSize,
}

/// The addresses that a module is linked for, each suitably aligned. All must be in the top 2 GiB,
/// within reach of each other and of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadAddresses {
    /// Address of the region that is executable and read-only.
    pub code: Gva,
    /// Address of the region that is read-only and not executable.
    pub rodata: Gva,
    /// Address of the region that is writable and not executable.
    pub data: Gva,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::module) enum Region {
    Code,
    RoData,
    Data,
}

/// Where a section goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::module) struct SectionSlot {
    pub region: Region,
    pub offset: u64,
}

/// Where all sections go, and what that adds up to.
#[derive(Clone, Debug)]
pub(in crate::module) struct SectionLayout {
    /// By index of the section; `None`: it is not placed in the guest.
    pub slots: Vec<Option<SectionSlot>>,
    pub sizes: Sizes,
}

impl SectionLayout {
    pub fn new(
        sections: &[Section],
        placements: &[Placement],
    ) -> Result<SectionLayout, ModuleError> {
        let mut slots = vec![None; sections.len()];
        let mut code = Cursor::new();
        let mut rodata = Cursor::new();
        let mut data = Cursor::new();
        for ((section, placement), slot) in sections.iter().zip(placements).zip(&mut slots) {
            let (cursor, region) = match placement {
                Placement::Text => (&mut code, Region::Code),
                Placement::RoData => (&mut rodata, Region::RoData),
                Placement::Data => (&mut data, Region::Data),
                Placement::Dropped | Placement::Refused => continue,
            };
            let offset = cursor.add(section)?;
            *slot = Some(SectionSlot { region, offset });
        }
        Ok(SectionLayout {
            slots,
            sizes: Sizes {
                code: code.size,
                rodata: rodata.size,
                data: data.size,
            },
        })
    }

    /// Checks that `load_at` fits: aligned, no wraparound, no overlap.
    pub fn check(&self, load_at: &LoadAddresses) -> Result<(), LinkError> {
        let regions = [
            (load_at.code, self.sizes.code),
            (load_at.rodata, self.sizes.rodata),
            (load_at.data, self.sizes.data),
        ];
        for (base, size) in regions {
            if !base.0.is_multiple_of(size.align) || base.0.checked_add(size.len).is_none() {
                return Err(LinkError::LoadAddress("it is not aligned or wraps around"));
            }
        }
        let [code, rodata, data] = regions;
        for ((a, a_size), (b, b_size)) in [(code, rodata), (code, data), (rodata, data)] {
            let apart = a.0 + a_size.len <= b.0 || b.0 + b_size.len <= a.0;
            if !apart && a_size.len > 0 && b_size.len > 0 {
                return Err(LinkError::LoadAddress("code, constants and data overlap"));
            }
        }
        Ok(())
    }
}

/// The end of a region while sections are added to it.
struct Cursor {
    size: RegionSize,
}

impl Cursor {
    fn new() -> Cursor {
        Cursor {
            size: RegionSize { len: 0, align: 16 },
        }
    }

    /// Adds a section; returns its offset.
    fn add(&mut self, section: &Section) -> Result<u64, ModuleError> {
        let align = section.align;
        if !align.is_power_of_two() || align > MAX_ALIGN {
            return Err(ModuleError::Damaged(format!(
                "section {} has an alignment of {align}; \
                 it must be a power of two, at most {MAX_ALIGN}",
                section.name
            )));
        }
        let start = self.size.len.next_multiple_of(align);
        self.size.len = start
            .checked_add(section.size)
            .filter(|&end| end <= MAX_REGION)
            .ok_or_else(|| ModuleError::TooMany {
                what: "bytes of code or data",
                count: usize::try_from(section.size).unwrap_or(usize::MAX),
                max: usize::try_from(MAX_REGION).unwrap_or(usize::MAX),
            })?;
        self.size.align = self.size.align.max(align);
        Ok(start)
    }
}
