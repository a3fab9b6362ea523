//! The value of every symbol of a module: the module's own by their section, undefined ones by the
//! kernel's exports, livepatch symbols by the kernel's full symbol table.
//!
//! This module follows `kernel/module/main.c: simplify_symbols, resolve_symbol` and
//! `kernel/livepatch/core.c: klp_resolve_symbols`.

use introspect::Gva;

use crate::module::error::{LinkError, ModuleError};
use crate::module::file::LivepatchModule;
use crate::module::file::elf::{Place, Symbol, limit};
use crate::module::file::layout::{LoadAddresses, Region};
use crate::module::file::sections::Placement;
use crate::module::kernel::TargetKernel;
use crate::module::link::modversions::Modversions;
use crate::module::link::refusals::Refusals;

/// The most undefined symbols: each costs a search in guest memory.
const MAX_UNDEFINED: usize = 8192;

/// The value of a symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::module) enum Value {
    /// This address.
    At(Gva),
    /// None: it is in a part of the module that is not placed in the guest.
    Dropped,
    /// None, and the module is refused for it.
    Refused,
}

/// The addresses of a module's sections and the values of its symbols, by index.
pub(in crate::module) struct Symbols {
    sections: Vec<Option<Gva>>,
    values: Vec<Value>,
}

impl Symbols {
    /// `refusals` gets an error for each symbol that cannot be had.
    pub fn resolve<T: TargetKernel + ?Sized>(
        module: &LivepatchModule,
        target: &T,
        modversions: &Modversions<'_>,
        load_at: &LoadAddresses,
        refusals: &mut Refusals<'_>,
    ) -> Result<Symbols, LinkError> {
        let sections: Vec<Option<Gva>> = module
            .layout
            .slots
            .iter()
            .map(|slot| {
                slot.map(|slot| match slot.region {
                    Region::Code => load_at.code.add(slot.offset),
                    Region::RoData => load_at.rodata.add(slot.offset),
                    Region::Data => load_at.data.add(slot.offset),
                })
            })
            .collect();
        let undefined = |s: &&Symbol| matches!(s.place, Place::Undefined | Place::Livepatch);
        let count = module.file.symbols.iter().filter(undefined).count();
        limit("undefined symbols", count, MAX_UNDEFINED)?;
        let mut values = Vec::with_capacity(module.file.symbols.len());
        for (index, symbol) in module.file.symbols.iter().enumerate() {
            values.push(match symbol.place {
                // The null symbol.
                Place::Undefined if index == 0 => Value::At(Gva(0)),
                Place::Undefined => {
                    let value = undefined_value(module, target, modversions, symbol);
                    refusals.value(index, value)?
                }
                Place::Absolute => Value::At(Gva(symbol.value)),
                Place::Livepatch => match symbol.name.strip_prefix(".klp.sym.") {
                    Some(name) => refusals.value(index, livepatch_value(target, name))?,
                    // Tombstones of klp-build: they have names and are never used.
                    None => Value::Dropped,
                },
                Place::Common => {
                    return Err(ModuleError::Damaged(format!(
                        "{} is a common symbol: compile with -fno-common",
                        symbol.name
                    ))
                    .into());
                }
                Place::Section(section) => match sections.get(section) {
                    Some(Some(base)) => Value::At(base.add(symbol.value)),
                    _ if module.placements.get(section) == Some(&Placement::Refused) => {
                        Value::Refused
                    }
                    _ => Value::Dropped,
                },
            });
        }
        Ok(Symbols { sections, values })
    }

    pub fn value(&self, symbol: usize) -> Value {
        self.values.get(symbol).copied().unwrap_or(Value::Dropped)
    }

    /// The address of a section; `None`: it is not placed in the guest.
    pub fn section_base(&self, section: usize) -> Option<Gva> {
        self.sections.get(section).copied().flatten()
    }
}

fn undefined_value<T: TargetKernel + ?Sized>(
    module: &LivepatchModule,
    target: &T,
    modversions: &Modversions<'_>,
    symbol: &Symbol,
) -> Result<Gva, LinkError> {
    let name = &symbol.name;
    let Some(export) = target.export(name)? else {
        return if symbol.weak {
            Ok(Gva(0))
        } else {
            Err(LinkError::UnknownSymbol(name.clone()))
        };
    };
    if export.gpl_only && !module.info.is_gpl_compatible() {
        return Err(LinkError::GplOnly {
            symbol: name.clone(),
            license: module.info.license.clone(),
        });
    }
    if let Some(namespace) = &export.namespace
        && !module.info.namespaces.contains(namespace)
    {
        return Err(LinkError::Namespace {
            symbol: name.clone(),
            namespace: namespace.clone(),
        });
    }
    modversions.check_symbol(name, &export)?;
    Ok(export.address)
}

/// The value of a livepatch symbol; `full` is `OBJECT.NAME,POSITION`.
fn livepatch_value<T: TargetKernel + ?Sized>(target: &T, full: &str) -> Result<Gva, LinkError> {
    let parts = full.split_once('.').and_then(|(object, rest)| {
        let (name, position) = rest.split_once(',')?;
        Some((object, name, position.parse::<u64>().ok()?))
    });
    match parts {
        Some(("vmlinux", name, sympos)) => {
            let found = pick(&target.symbols(name), name, sympos)?;
            let init = (target.symbol("__init_begin"), target.symbol("__init_end"));
            match init {
                (Some(begin), Some(end)) if (begin..end).contains(&found) => {
                    Err(LinkError::InitSymbol(name.to_owned()))
                }
                _ => Ok(found),
            }
        }
        Some((object, ..)) => Err(ModuleError::ModuleTarget(object.to_owned()).into()),
        None => {
            Err(ModuleError::Damaged(format!("livepatch symbol {full} has no position")).into())
        }
    }
}

/// Picks one of the symbols of a name, as `kernel/livepatch/core.c: klp_find_object_symbol` does.
pub(in crate::module) fn pick(found: &[Gva], name: &str, sympos: u64) -> Result<Gva, LinkError> {
    let missing = || LinkError::NotFound {
        name: name.to_owned(),
        sympos,
    };
    match (found, sympos) {
        ([], _) => Err(missing()),
        ([one], 0) => Ok(*one),
        (several, 0) => Err(LinkError::Ambiguous {
            name: name.to_owned(),
            count: several.len(),
        }),
        (_, n) => usize::try_from(n - 1)
            .ok()
            .and_then(|index| found.get(index))
            .copied()
            .ok_or_else(missing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_from_one_and_zero_means_the_only_one() {
        let two = [Gva(0x10), Gva(0x20)];
        assert_eq!(pick(&two, "f", 2), Ok(Gva(0x20)));
        assert_eq!(pick(&two[..1], "f", 0), Ok(Gva(0x10)));
        assert_eq!(
            pick(&two, "f", 0),
            Err(LinkError::Ambiguous {
                name: "f".into(),
                count: 2
            })
        );
        for (list, sympos) in [(&two[..], 3), (&two[..], u64::MAX), (&[][..], 0)] {
            assert_eq!(
                pick(list, "f", sympos),
                Err(LinkError::NotFound {
                    name: "f".into(),
                    sympos
                })
            );
        }
    }
}
