//! The ACPI tables of a hardware-reduced machine: RSDP, XSDT, FADT, MADT, DSDT.
//!
//! The machine is hardware-reduced so that it needs no PM timer, no SCI and no 8259s. Such a
//! machine has only those legacy devices that the DSDT lists, so the DSDT lists COM1: without it
//! the guest would have no console.

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::legacy::{power, serial};
use crate::layout;

const OEM: [u8; 6] = *b"OUTPTC";
const TABLE: [u8; 8] = *b"OUTPATCH";
const REVISION: u32 = 1;
const SDT_HEADER: u32 = 36;
/// ACPI 6.5, 5.2.9.3: there is no VGA to probe. As the 8042 bit is not set, there is no keyboard to
/// probe either.
const IAPC_NO_VGA: u16 = 1 << 2;

/// The tables do not fit between [`layout::ACPI`] and [`layout::ACPI_END`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ACPI tables do not fit in the 64 KiB reserved for them")]
pub struct TablesTooLarge;

/// Writes the tables of a machine with `cpus` vCPUs; the address of the RSDP.
///
/// # Errors
/// [`TablesTooLarge`].
pub fn write_tables(memory: &GuestMemoryMmap, cpus: u8) -> Result<GuestAddress, TablesTooLarge> {
    let rsdp = layout::ACPI;
    let mut area = Area {
        memory,
        next: GuestAddress(rsdp.0 + 64),
    };
    let dsdt = area.put(&dsdt())?;
    let fadt = area.put(&fadt(dsdt))?;
    let madt = area.put(&madt(cpus))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt.0);
    xsdt.add_entry(madt.0);
    let xsdt = area.put(&xsdt)?;
    area.next = rsdp;
    area.put(&Rsdp::new(OEM, xsdt.0))
}

/// The memory area for the tables, which are written one after the other.
struct Area<'a> {
    memory: &'a GuestMemoryMmap,
    next: GuestAddress,
}

impl Area<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<GuestAddress, TablesTooLarge> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = self.next;
        let end = at.0 + bytes.len() as u64;
        if end > layout::ACPI_END.0 {
            return Err(TablesTooLarge);
        }
        self.memory
            .write_slice(&bytes, at)
            .map_err(|_| TablesTooLarge)?;
        self.next = GuestAddress(end.next_multiple_of(16));
        Ok(at)
    }
}

fn register(offset: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(power::PORT + offset),
    )
}

fn fadt(dsdt: GuestAddress) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt.0)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // These flags say that the buttons are not fixed hardware. There are no buttons at all.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1);
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.iapc_boot_arch = IAPC_NO_VGA.into();
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let mut madt = MADT::new(
        OEM,
        TABLE,
        REVISION,
        LocalInterruptController::Address(layout::LAPIC),
    );
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt() -> Sdt {
    let mut code = Vec::new();
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &aml::ZERO),
                &Name::new("_DDN".into(), &"COM1"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Interrupt::new(true, true, false, false, serial::GSI),
                        &IO::new(serial::PORT, serial::PORT, 0, 8),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut code);
    Name::new("_S5_".into(), &Package::new(vec![&power::S5_TYPE])).to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", SDT_HEADER, 6, OEM, TABLE, REVISION);
    dsdt.append_slice(&code);
    dsdt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// The whole table at `at`, after its checksum was checked.
    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let len = usize::try_from(u32_at(&read(memory, at, 8), 4)).unwrap();
        let bytes = read(memory, at, len);
        assert_eq!(bytes.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b)), 0);
        bytes
    }

    #[test]
    fn a_guest_finds_every_table_from_the_rsdp() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let rsdp = read(&memory, write_tables(&memory, 8).unwrap().0, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64_at(&rsdp, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(&memory, u64_at(&xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        let madt = table(&memory, u64_at(&xsdt, 44));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(madt.len(), 44 + 8 * 8 + 12);
        let dsdt = table(&memory, u64_at(&fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        assert!(dsdt.windows(4).any(|w| w == b"COM1"));
        // The reset register and value, then the sleep registers, where ACPI 6.5, 5.2.9 has them.
        assert_eq!((fadt[116], u64_at(&fadt, 120), fadt[128]), (1, 0x602, 1));
        assert_eq!((u64_at(&fadt, 248), u64_at(&fadt, 260)), (0x600, 0x601));
    }
}
