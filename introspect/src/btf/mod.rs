//! BTF: the kernel's own description of its types, parsed from guest memory.
//!
//! This module follows `include/uapi/linux/btf.h` and `Documentation/bpf/btf.rst`, kinds 1 to 19
//! (5.10 has 1 to 13). It finds members of structures by path, for example `task_struct.thread.sp`,
//! also through members that have no name. Which members are needed is the business of
//! [`Layout`](crate::kernel::Layout).

mod raw;

use crate::btf::raw::{Kind, RawMember, Type};
use crate::memory::kernel::Field;

pub use crate::btf::raw::BtfError;

/// The most typedefs and qualifiers around a type, and dimensions of an array: no real type has
/// nearly so many.
const MAX_DEPTH: usize = 64;
/// The most steps of one lookup: members examined, typedefs followed. Bounds the cost of nested
/// unnamed structures, long chains of typedefs and many structures of one name together;
/// `task_struct` needs some hundreds.
const MAX_STEPS: usize = 1 << 16;
/// The most bytes of the names of structures, unions and enumerations together; the largest kernels
/// have 3 MiB. They are sorted, and types can share one long name.
const MAX_NAMES: usize = 32 << 20;

/// The bits of a bit field within the bytes that its [`Member`] covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits {
    /// Its lowest bit, counted from the lowest bit of the first byte.
    pub shift: u32,
    /// Its width in bits.
    pub width: u32,
}

/// A member of a structure, found by its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Member {
    /// Offset in bytes from the start of the outermost structure.
    pub offset: u64,
    /// Size in bytes; of an array, all elements together.
    pub size: u64,
    /// The bits of a bit field; `None` for any other member.
    pub bits: Option<Bits>,
    /// The number of elements of an array; `None` for any other member.
    pub count: Option<u64>,
    /// The BTF id of its type, without typedefs and qualifiers.
    pub type_id: u32,
}

impl Member {
    /// Its offset and size, without its type.
    #[must_use]
    pub const fn field(&self) -> Field {
        Field {
            offset: self.offset,
            size: self.size,
        }
    }

    /// The size in bytes of one element of an array; of any other member, its size.
    #[must_use]
    pub fn element(&self) -> u64 {
        match self.count {
            Some(count) if count > 0 => self.size / count,
            _ => self.size,
        }
    }
}

/// The steps that are left of [`MAX_STEPS`].
struct Steps(usize);

impl Steps {
    /// Takes one step, for type `id`.
    fn take(&mut self, id: u32) -> Result<(), BtfError> {
        self.0 = self.0.checked_sub(1).ok_or(BtfError::Malformed(id))?;
        Ok(())
    }
}

/// The types of a kernel.
#[derive(Debug)]
pub struct Btf {
    raw: raw::Raw,
    /// The ids of the types that have a name, and members, enumerators or variables, in order of
    /// name.
    named: Vec<u32>,
}

impl Btf {
    /// Parses the bytes of a `.BTF` section (not of a module's: those extend the core kernel's).
    ///
    /// # Errors
    /// [`BtfError`] when the bytes are not BTF, or have a type of unknown kind.
    pub fn parse(bytes: Vec<u8>) -> Result<Btf, BtfError> {
        let raw = raw::Raw::parse(bytes)?;
        let wanted = |kind| {
            matches!(
                kind,
                Kind::Struct | Kind::Union | Kind::Enum | Kind::Enum64 | Kind::DataSec
            )
        };
        let wanted = |found: &Type| wanted(found.kind) && found.name != 0;
        // Counted first, so that it never grows.
        let count = raw.iter().filter(|(_, found)| wanted(found)).count();
        let mut named: Vec<(&[u8], u32)> = Vec::with_capacity(count);
        let mut names = 0;
        for (id, found) in raw.iter().filter(|(_, found)| wanted(found)) {
            let name = raw.name(found.name);
            names += name.len();
            named.push((name, id));
        }
        if names > MAX_NAMES {
            return Err(BtfError::Header("its names are too long"));
        }
        named.sort_unstable(); // by name, then by id
        let named = named.into_iter().map(|(_, id)| id).collect();
        Ok(Btf { raw, named })
    }

    /// The number of types.
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.len()
    }

    /// Whether there is no type.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every structure, union, enumeration or section named `name`: different files of the kernel
    /// may use one name twice.
    fn named(&self, name: &str) -> impl Iterator<Item = (u32, Type)> {
        let own = |id: u32| {
            self.raw
                .get(id)
                .map_or(&b""[..], |found| self.raw.name(found.name))
        };
        let start = self.named.partition_point(|&id| own(id) < name.as_bytes());
        self.named
            .get(start..)
            .unwrap_or_default()
            .iter()
            .map_while(move |&id| {
                let found = self.raw.get(id)?;
                self.raw.is_named(found.name, name).then_some((id, found))
            })
    }

    fn aggregates(&self, name: &str) -> impl Iterator<Item = (u32, Type)> {
        self.named(name)
            .filter(|(_, found)| matches!(found.kind, Kind::Struct | Kind::Union))
    }

    /// Whether there is a structure or union named `name`.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.aggregates(name).next().is_some()
    }

    /// The size in bytes of the structure or union named `name`.
    ///
    /// # Errors
    /// [`BtfError::NoType`] when there is none.
    pub fn size_of(&self, name: &str) -> Result<u64, BtfError> {
        self.aggregates(name)
            .next()
            .map(|(_, found)| u64::from(found.size_or_type))
            .ok_or_else(|| BtfError::NoType(name.to_owned()))
    }

    /// The member that a path leads to: a structure or union, then members, for example
    /// `"task_struct.thread.sp"`.
    ///
    /// # Errors
    /// [`BtfError`], with the type or the member that is missing.
    pub fn member(&self, path: &str) -> Result<Member, BtfError> {
        let mut parts = path.split('.');
        let name = parts.next().unwrap_or_default();
        let mut error = BtfError::NoType(name.to_owned());
        let mut steps = Steps(MAX_STEPS);
        for (id, _) in self.aggregates(name) {
            match self.follow(id, parts.clone(), path, &mut steps) {
                Ok(member) => return Ok(member),
                Err(found) => error = found,
            }
            if steps.0 == 0 {
                break;
            }
        }
        Err(error)
    }

    /// The offset and size of a [`member`](Self::member).
    ///
    /// # Errors
    /// [`BtfError`], with the type or the member that is missing.
    pub fn field(&self, path: &str) -> Result<Field, BtfError> {
        self.member(path).map(|member| member.field())
    }

    /// Whether the member that a path leads to is a pointer to the structure or union named `name`.
    ///
    /// # Errors
    /// [`BtfError`], with the type or the member that is missing.
    pub fn points_to(&self, path: &str, name: &str) -> Result<bool, BtfError> {
        let member = self.member(path)?;
        let pointer = self.raw.get(member.type_id);
        let Some(pointer) = pointer.filter(|found| found.kind == Kind::Pointer) else {
            return Ok(false);
        };
        let target = self.strip(pointer.size_or_type, &mut Steps(MAX_STEPS))?;
        Ok(self.aggregates(name).any(|(id, _)| id == target))
    }

    /// The first of several paths that leads to a member: for a field that has had more than one
    /// name.
    ///
    /// # Errors
    /// The error of the first path, when none leads anywhere.
    pub fn first_field(&self, paths: &[&str]) -> Result<Field, BtfError> {
        let mut found = paths.iter().map(|path| self.field(path));
        let first = found
            .next()
            .unwrap_or_else(|| Err(BtfError::NoType(String::new())));
        first.or_else(|error| found.find_map(Result::ok).ok_or(error))
    }

    fn follow<'p>(
        &self,
        id: u32,
        parts: impl Iterator<Item = &'p str>,
        path: &str,
        steps: &mut Steps,
    ) -> Result<Member, BtfError> {
        let mut member = Member {
            offset: 0,
            size: self.extent(id, steps)?.0,
            bits: None,
            count: None,
            type_id: id,
        };
        for part in parts {
            let no_field = || BtfError::NoField {
                path: path.to_owned(),
                field: part.to_owned(),
            };
            let (bit, found) = self
                .find_member(member.type_id, part, steps)?
                .ok_or_else(no_field)?;
            member = self.describe(member.offset, bit, found, steps)?;
        }
        Ok(member)
    }

    /// Describes the member at `bit` of the structure at `base`.
    fn describe(
        &self,
        base: u64,
        bit: u64,
        found: RawMember,
        steps: &mut Steps,
    ) -> Result<Member, BtfError> {
        let type_id = self.strip(found.type_id, steps)?;
        let (size, count) = self.extent(type_id, steps)?;
        let mut offset = base.wrapping_add(bit / 8);
        let mut size = size;
        let mut bits = None;
        if found.bits != 0 {
            // The fewest bytes that hold the whole bit field.
            let shift = u32::try_from(bit % 8).unwrap_or(0);
            size = u64::from((shift + found.bits).div_ceil(8)).next_power_of_two();
            bits = Some(Bits {
                shift,
                width: found.bits,
            });
        } else if !bit.is_multiple_of(8) {
            return Err(BtfError::Malformed(found.type_id));
        }
        offset = offset.min(u64::from(u32::MAX));
        Ok(Member {
            offset,
            size,
            bits,
            count,
            type_id,
        })
    }

    /// Finds a member by name, also inside members that have none: its bit offset and itself.
    fn find_member(
        &self,
        id: u32,
        name: &str,
        steps: &mut Steps,
    ) -> Result<Option<(u64, RawMember)>, BtfError> {
        let mut work = vec![(id, 0u64)];
        while let Some((id, base)) = work.pop() {
            let Some(aggregate) = self.raw.get(id) else {
                return Err(BtfError::Malformed(id));
            };
            for member in self.raw.members(&aggregate) {
                steps.take(id)?;
                let bit = base.wrapping_add(u64::from(member.bit));
                if member.name == 0 {
                    work.push((self.strip(member.type_id, steps)?, bit));
                } else if self.raw.is_named(member.name, name) {
                    return Ok(Some((bit, member)));
                }
            }
        }
        Ok(None)
    }

    /// The type that typedefs and qualifiers lead to.
    fn strip(&self, id: u32, steps: &mut Steps) -> Result<u32, BtfError> {
        let mut at = id;
        for _ in 0..MAX_DEPTH {
            steps.take(id)?;
            match self.raw.get(at) {
                Some(found) if found.kind.is_transparent() => at = found.size_or_type,
                _ => return Ok(at),
            }
        }
        Err(BtfError::Malformed(id))
    }

    /// The size of a type in bytes, and the number of elements of an array (of arrays: in all
    /// dimensions).
    fn extent(&self, id: u32, steps: &mut Steps) -> Result<(u64, Option<u64>), BtfError> {
        let mut at = self.strip(id, steps)?;
        let mut count: Option<u64> = None;
        for _ in 0..MAX_DEPTH {
            let Some(found) = self.raw.get(at) else {
                return Ok((0, count)); // void
            };
            let Some(array) = self.raw.array(&found) else {
                let size = found.kind.size(found.size_or_type);
                return Ok((size.saturating_mul(count.unwrap_or(1)), count));
            };
            count = Some(count.unwrap_or(1).saturating_mul(u64::from(array.count)));
            at = self.strip(array.element, steps)?;
        }
        Err(BtfError::Malformed(id))
    }

    /// The value of an enumerator.
    ///
    /// # Errors
    /// [`BtfError::NoType`] when no enumeration has it.
    pub fn enum_value(&self, enumerator: &str) -> Result<i64, BtfError> {
        self.raw
            .iter()
            .filter(|(_, found)| matches!(found.kind, Kind::Enum | Kind::Enum64))
            .flat_map(|(_, found)| self.raw.enumerators(found))
            .find(|&(name, _)| self.raw.is_named(name, enumerator))
            .map(|(_, value)| value)
            .ok_or_else(|| BtfError::NoType(enumerator.to_owned()))
    }

    /// The per-CPU variables in BTF: name, offset in the per-CPU area in bytes, size in bytes. 5.10
    /// has none.
    pub fn percpu_vars(&self) -> impl Iterator<Item = (String, u32, u32)> {
        self.named(".data..percpu")
            .filter(|(_, found)| found.kind == Kind::DataSec)
            .flat_map(|(_, section)| self.raw.variables(section))
            .filter_map(|variable| {
                let found = self.raw.get(variable.type_id)?;
                let name = String::from_utf8_lossy(self.raw.name(found.name)).into_owned();
                Some((name, variable.offset, variable.size))
            })
    }
}

#[cfg(test)]
mod tests;
