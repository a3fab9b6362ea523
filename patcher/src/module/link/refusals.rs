//! [`Refusals`]: every reason for which linking a module is refused, so that all can be told at
//! once.
//!
//! This module knows which errors leave the rest of the module to be examined.

use crate::module::error::{LinkError, ModuleError};
use crate::module::file::names::Names;
use crate::module::link::symbols::Value;
use introspect::Gva;

/// The most reasons that are kept.
const MAX: usize = 100;

/// The reasons that were found so far.
pub(in crate::module) struct Refusals<'a> {
    names: Names<'a>,
    found: Vec<LinkError>,
}

impl<'a> Refusals<'a> {
    /// None so far, of a module with these names.
    pub fn new(names: Names<'a>) -> Refusals<'a> {
        let found = Vec::new();
        Refusals { names, found }
    }

    /// The names of the module's functions.
    pub fn names(&self) -> &Names<'a> {
        &self.names
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        !self.found.is_empty()
    }

    /// Whether another one would be kept.
    pub fn wanted(&self) -> bool {
        self.found.len() < MAX
    }

    /// Keeps a reason, once.
    pub fn add(&mut self, error: LinkError) {
        if self.wanted() && !self.found.contains(&error) {
            self.found.push(error);
        }
    }

    /// The value of symbol `index`, which the kernel was asked for.
    ///
    /// # Errors
    /// [`LinkError`] if the reason is in the kernel and not in this symbol.
    pub fn value(
        &mut self,
        index: usize,
        found: Result<Gva, LinkError>,
    ) -> Result<Value, LinkError> {
        let error = match found {
            Ok(address) => return Ok(Value::At(address)),
            Err(error) => error,
        };
        let of_symbol = matches!(
            error,
            LinkError::UnknownSymbol(_)
                | LinkError::GplOnly { .. }
                | LinkError::Namespace { .. }
                | LinkError::NotFound { .. }
                | LinkError::Ambiguous { .. }
                | LinkError::InitSymbol(_)
                | LinkError::Module(ModuleError::ModuleTarget(_))
        );
        if !of_symbol {
            return Err(error);
        }
        if self.wanted() {
            let source = Box::new(error);
            self.add(match self.names.user_of(index) {
                Some(user) => LinkError::Used {
                    user: user.to_owned(),
                    source,
                },
                None => *source,
            });
        }
        Ok(Value::Refused)
    }

    /// All reasons; `last` is what ended the linking, if anything did. It is left out if it may be
    /// a consequence of another.
    pub fn into_errors(self, last: Option<LinkError>) -> Vec<LinkError> {
        match self.any() {
            true => self.found,
            false => last.into_iter().collect(),
        }
    }
}
