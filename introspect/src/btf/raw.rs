//! The encoding of BTF: header, type records, strings. This module knows which bytes mean what, and
//! nothing of names in the kernel.

/// The size in bytes of `struct btf_header` up to and including `str_len`.
const HEADER: usize = 24;
const MAGIC: u16 = 0xeb9f;
/// The most types that are read: the largest kernels have about 130,000.
const MAX_TYPES: usize = 1 << 19;
/// The most bytes of a name: `KSYM_NAME_LEN`, the kernel's own bound (`kernel/bpf/btf.c:
/// btf_name_valid_identifier`). A longer string is no name: to search its end would be to read all
/// strings, once for each type that has it.
const MAX_NAME: usize = 512;

/// BTF is malformed, or lacks a type or a member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BtfError {
    /// The bytes do not begin with a valid BTF header.
    #[error("not BTF: {0}")]
    Header(&'static str),
    /// A type record has a kind that this program does not know.
    #[error("BTF type {id} is of unknown kind {kind}: the guest kernel is newer than this program")]
    UnknownKind {
        /// The id of the type.
        id: usize,
        /// Its `BTF_KIND_*` number.
        kind: u32,
    },
    /// The type records end in the middle of this one.
    #[error("BTF type {0} is cut off")]
    Truncated(usize),
    /// A type refers to itself, or to what it cannot.
    #[error("BTF type {0} is malformed")]
    Malformed(u32),
    /// The kernel has no type, or enumerator, of this name.
    #[error("the guest kernel has no type {0}")]
    NoType(String),
    /// The type has no such member.
    #[error("the guest kernel has no {path}: no member {field}")]
    NoField {
        /// The path that was searched.
        path: String,
        /// The first part of the path that does not exist.
        field: String,
    },
}

/// `BTF_KIND_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Int,
    Pointer,
    Array,
    Struct,
    Union,
    Enum,
    Forward,
    /// Typedef, volatile, const, restrict or type tag: another name for a type.
    Transparent,
    Function,
    Prototype,
    Variable,
    DataSec,
    Float,
    DeclTag,
    Enum64,
}

impl Kind {
    fn from_raw(raw: u32) -> Option<Kind> {
        Some(match raw {
            1 => Kind::Int,
            2 => Kind::Pointer,
            3 => Kind::Array,
            4 => Kind::Struct,
            5 => Kind::Union,
            6 => Kind::Enum,
            7 => Kind::Forward,
            8..=11 | 18 => Kind::Transparent,
            12 => Kind::Function,
            13 => Kind::Prototype,
            14 => Kind::Variable,
            15 => Kind::DataSec,
            16 => Kind::Float,
            17 => Kind::DeclTag,
            19 => Kind::Enum64,
            _ => return None,
        })
    }

    /// The bytes of the record after the twelve that all records have.
    fn trailing(self, vlen: usize) -> usize {
        match self {
            Kind::Int | Kind::Variable | Kind::DeclTag => 4,
            Kind::Array => 12,
            Kind::Struct | Kind::Union | Kind::DataSec | Kind::Enum64 => 12 * vlen,
            Kind::Enum | Kind::Prototype => 8 * vlen,
            Kind::Pointer | Kind::Forward | Kind::Transparent | Kind::Function | Kind::Float => 0,
        }
    }

    pub(crate) fn is_transparent(self) -> bool {
        self == Kind::Transparent
    }

    /// The size in bytes of a type of this kind whose record says `size`. 0 for an array, whose
    /// record does not say it.
    pub(crate) fn size(self, size: u32) -> u64 {
        match self {
            Kind::Int | Kind::Struct | Kind::Union | Kind::Enum | Kind::Enum64 | Kind::Float => {
                u64::from(size)
            }
            Kind::Pointer => 8,
            _ => 0,
        }
    }
}

/// One type record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Type {
    /// Offset of its name in the strings; 0 for no name.
    pub(crate) name: u32,
    pub(crate) kind: Kind,
    flag: bool,
    vlen: usize,
    pub(crate) size_or_type: u32,
    /// Where its trailing bytes begin.
    at: usize,
}

/// A member of a structure or union.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMember {
    pub(crate) name: u32,
    pub(crate) type_id: u32,
    /// Offset from the start of the structure, in bits.
    pub(crate) bit: u32,
    /// Width of a bit field in bits; 0 for any other member.
    pub(crate) bits: u32,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Array {
    pub(crate) element: u32,
    pub(crate) count: u32,
}

/// A variable in a section.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Variable {
    pub(crate) type_id: u32,
    pub(crate) offset: u32,
    pub(crate) size: u32,
}

/// The bytes, and where each type begins.
pub(crate) struct Raw {
    bytes: Vec<u8>,
    /// Where the record of type `n + 1` begins.
    types: Vec<u32>,
    strings: std::ops::Range<usize>,
}

impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw")
            .field("types", &self.types.len())
            .finish_non_exhaustive()
    }
}

impl Raw {
    pub(crate) fn parse(bytes: Vec<u8>) -> Result<Raw, BtfError> {
        let word = |at| u32_at(&bytes, at).and_then(|value| usize::try_from(value).ok());
        let first = u32_at(&bytes, 0).ok_or(BtfError::Header("shorter than its header"))?;
        if first & 0xffff != u32::from(MAGIC) {
            return Err(BtfError::Header("wrong magic number"));
        }
        let header = (|| Some([word(4)?, word(8)?, word(12)?, word(16)?, word(20)?]))()
            .ok_or(BtfError::Header("shorter than its header"))?;
        let [len, type_off, type_len, str_off, str_len] = header;
        let part = |off: usize, part_len: usize| {
            let start = len.checked_add(off)?;
            let end = start.checked_add(part_len)?;
            (len >= HEADER && end <= bytes.len()).then_some(start..end)
        };
        let outside = BtfError::Header("a part lies outside it");
        let types = part(type_off, type_len).ok_or(outside.clone())?;
        let strings = part(str_off, str_len).ok_or(outside)?;
        let types = index(&bytes, types)?;
        Ok(Raw {
            bytes,
            types,
            strings,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.types.len()
    }

    /// The type with that id; `None` for 0, which is void.
    pub(crate) fn get(&self, id: u32) -> Option<Type> {
        let index = usize::try_from(id.checked_sub(1)?).ok()?;
        let at = usize::try_from(*self.types.get(index)?).ok()?;
        record(&self.bytes, at)?.ok()
    }

    /// All types with their ids.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, Type)> {
        (1..=u32::try_from(self.types.len()).unwrap_or(u32::MAX))
            .filter_map(|id| Some((id, self.get(id)?)))
    }

    /// The strings from `offset` on.
    fn strings_from(&self, offset: u32) -> &[u8] {
        let strings = self.bytes.get(self.strings.clone()).unwrap_or_default();
        strings.get(offset as usize..).unwrap_or_default()
    }

    /// The string at `offset`; empty when there is no valid one.
    pub(crate) fn name(&self, offset: u32) -> &[u8] {
        let rest = self.strings_from(offset);
        let near = rest.get(..rest.len().min(MAX_NAME)).unwrap_or_default();
        let len = near.iter().position(|&byte| byte == 0).unwrap_or(0);
        near.get(..len).unwrap_or_default()
    }

    /// Whether the string at `offset` is `name`. Costs no more than the length of `name`, whatever
    /// the length of the string.
    pub(crate) fn is_named(&self, offset: u32, name: &str) -> bool {
        self.strings_from(offset)
            .strip_prefix(name.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    /// The records after that of a type, of `WORDS` words each.
    fn records<const WORDS: usize>(&self, of: &Type) -> impl Iterator<Item = [u32; WORDS]> {
        let start = of.at;
        (0..of.vlen).map_while(move |n| {
            let mut record = [0; WORDS];
            for (i, word) in record.iter_mut().enumerate() {
                *word = u32_at(&self.bytes, start + (n * WORDS + i) * 4)?;
            }
            Some(record)
        })
    }

    pub(crate) fn members(&self, of: &Type) -> impl Iterator<Item = RawMember> {
        let flag = of.flag;
        let aggregate = matches!(of.kind, Kind::Struct | Kind::Union);
        self.records::<3>(of)
            .take_while(move |_| aggregate)
            .map(move |[name, type_id, offset]| RawMember {
                name,
                type_id,
                bit: if flag { offset & 0x00ff_ffff } else { offset },
                bits: if flag { offset >> 24 } else { 0 },
            })
    }

    pub(crate) fn array(&self, of: &Type) -> Option<Array> {
        if of.kind != Kind::Array {
            return None;
        }
        Some(Array {
            element: u32_at(&self.bytes, of.at)?,
            count: u32_at(&self.bytes, of.at + 8)?,
        })
    }

    /// The name and value of each enumerator.
    pub(crate) fn enumerators(&self, of: Type) -> impl Iterator<Item = (u32, i64)> {
        let wide = of.kind == Kind::Enum64;
        let words = if wide { 3 } else { 2 };
        (0..of.vlen).map_while(move |n| {
            let at = of.at + n * words * 4;
            let name = u32_at(&self.bytes, at)?;
            let low = u32_at(&self.bytes, at + 4)?;
            let value = if wide {
                let high = u32_at(&self.bytes, at + 8)?;
                (u64::from(high) << 32 | u64::from(low)).cast_signed()
            } else {
                i64::from(low.cast_signed())
            };
            Some((name, value))
        })
    }

    pub(crate) fn variables(&self, of: Type) -> impl Iterator<Item = Variable> {
        (0..of.vlen).map_while(move |n| {
            let at = of.at + n * 12;
            Some(Variable {
                type_id: u32_at(&self.bytes, at)?,
                offset: u32_at(&self.bytes, at + 4)?,
                size: u32_at(&self.bytes, at + 8)?,
            })
        })
    }
}

/// The offset of every type record.
fn index(bytes: &[u8], types: std::ops::Range<usize>) -> Result<Vec<u32>, BtfError> {
    let mut starts = Vec::new();
    let mut at = types.start;
    while at < types.end {
        let id = starts.len() + 1;
        let found = record(bytes, at)
            .ok_or(BtfError::Truncated(id))?
            .map_err(|kind| BtfError::UnknownKind { id, kind })?;
        let next = found.at + found.kind.trailing(found.vlen);
        if next > types.end || id > MAX_TYPES {
            return Err(BtfError::Truncated(id));
        }
        starts.push(u32::try_from(at).map_err(|_| BtfError::Header("too long"))?);
        at = next;
    }
    Ok(starts)
}

/// The record at `at`: `None` when it is cut off, its kind when that is unknown.
fn record(bytes: &[u8], at: usize) -> Option<Result<Type, u32>> {
    let info = u32_at(bytes, at + 4)?;
    let kind = info >> 24 & 0x1f;
    let size_or_type = u32_at(bytes, at + 8)?;
    Some(Kind::from_raw(kind).ok_or(kind).map(|kind| Type {
        name: u32_at(bytes, at).unwrap_or(0),
        kind,
        flag: info >> 31 != 0,
        vlen: (info & 0xffff) as usize,
        size_or_type,
        at: at + 12,
    }))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..at.checked_add(4)?)?;
    raw.try_into().ok().map(u32::from_le_bytes)
}
