//! The guest's function tracer, whose sites at the entries of functions the patches use.

pub mod ops;
pub mod site;
