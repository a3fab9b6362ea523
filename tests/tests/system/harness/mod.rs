//! What runs the scenarios: their list, the resources that each is given, and what is counted and
//! kept over a run.

pub mod assets;
pub mod fixture;
pub mod guest_counts;
pub mod kept_cores;
pub mod registry;
pub mod run;
pub mod scenario;
pub mod scratch;
pub mod shared_guest;
