//! [`SectionLayout`]: the offset of each section in the two regions, code and data, that a patch
//! gets in the guest. It is made before the addresses of the regions are known.
//!
//! Read-only data is placed with the data: the guest takes addresses in the padding of its text for
//! its own text, and hardened usercopy kills a task that copies from there.

use introspect::Gva;

use crate::module::error::{LinkError, ModuleError};
use crate::module::file::elf::Section;
use crate::module::file::sections::Placement;

/// The most bytes of code. The padding of the kernel's text, where code goes, has at most some MiB.
const MAX_CODE: u64 = 16 << 20;
const MAX_DATA: u64 = 16 << 20;
/// The largest alignment of a section, in bytes: a page.
const MAX_ALIGN: u64 = 4096;

/// How much memory a module needs in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of code.
    pub code: u64,
    /// Alignment that `code` needs; a power of two, at most 4096.
    pub code_align: u64,
    /// Bytes of writable and read-only data; 0 when the module has none.
    pub data: u64,
    /// Alignment that `data` needs; a power of two, at most 4096.
    pub data_align: u64,
}

/// The addresses that a module is linked for. Both must be in the top 2 GiB, within reach of each
/// other and of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadAddresses {
    /// Address of the region that is executable and read-only.
    pub code: Gva,
    /// Address of the region that is writable and not executable; any suitably aligned address when
    /// the module has no data.
    pub data: Gva,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::module) enum Region {
    Code,
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
        let mut code = Cursor::new(MAX_CODE);
        let mut data = Cursor::new(MAX_DATA);
        for (pass, region) in [
            (Placement::Text, Region::Code),
            (Placement::Data, Region::Data),
            (Placement::RoData, Region::Data),
        ] {
            let cursor = match region {
                Region::Code => &mut code,
                Region::Data => &mut data,
            };
            for ((section, placement), slot) in sections.iter().zip(placements).zip(&mut slots) {
                if *placement == pass {
                    let offset = cursor.add(section)?;
                    *slot = Some(SectionSlot { region, offset });
                }
            }
        }
        Ok(SectionLayout {
            slots,
            sizes: Sizes {
                code: code.end,
                code_align: code.align,
                data: data.end,
                data_align: data.align,
            },
        })
    }

    /// Checks that `load_at` fits: aligned, no wraparound, no overlap.
    pub fn check(&self, load_at: &LoadAddresses) -> Result<(), LinkError> {
        let fits = |base: Gva, size: u64, align: u64| {
            base.0.is_multiple_of(align) && base.0.checked_add(size).is_some()
        };
        let Sizes {
            code,
            code_align,
            data,
            data_align,
        } = self.sizes;
        if !fits(load_at.code, code, code_align) || !fits(load_at.data, data, data_align) {
            return Err(LinkError::LoadAddress("it is not aligned or wraps around"));
        }
        let apart =
            load_at.code.0 + code <= load_at.data.0 || load_at.data.0 + data <= load_at.code.0;
        if !apart && data > 0 {
            return Err(LinkError::LoadAddress("code and data overlap"));
        }
        Ok(())
    }
}

/// The end of a region while sections are added to it.
struct Cursor {
    end: u64,
    align: u64,
    max: u64,
}

impl Cursor {
    fn new(max: u64) -> Cursor {
        Cursor {
            end: 0,
            align: 16,
            max,
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
        let start = self.end.next_multiple_of(align);
        self.end = start
            .checked_add(section.size)
            .filter(|&end| end <= self.max)
            .ok_or_else(|| ModuleError::TooMany {
                what: "bytes of code or data",
                count: usize::try_from(section.size).unwrap_or(usize::MAX),
                max: usize::try_from(self.max).unwrap_or(usize::MAX),
            })?;
        self.align = self.align.max(align);
        Ok(start)
    }
}
