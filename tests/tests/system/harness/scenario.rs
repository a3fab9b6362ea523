//! A scenario: a named test with a part that runs inside the test bed, and parts that run on the
//! host around it.
//!
//! This module knows what a scenario consists of; it must not know which scenarios there are.

use std::env;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;

use crate::harness::assets::Assets;
use crate::harness::fixture::Fixture;

/// How long a scenario may take unless it sets a limit of its own.
const DEFAULT_LIMIT: Duration = Duration::from_secs(600);

/// Environment variable: when set, every scenario runs on each kernel that it is for.
const ALL: &str = "OUTPATCH_TEST_ALL";

/// What a scenario does inside the test bed.
type InBed = Box<dyn Fn(&Fixture) -> Result<()> + Send + Sync>;

/// What the host does before the bed starts: adds kernels that only this scenario needs.
type Prepare = Box<dyn Fn(&mut Assets) -> Result<()> + Send + Sync>;

/// What the host does while the bed runs, with the scratch folder that both share. The flag is set
/// once the bed has ended.
type Meanwhile = Box<dyn Fn(&Assets, &Path, &AtomicBool) -> Result<()> + Send + Sync>;

/// What the host does after the bed has succeeded, with what it left in the scratch folder.
type Then = Box<dyn Fn(&Assets, &Path) -> Result<()> + Send + Sync>;

/// A named scenario. A module of scenarios has a function `scenarios`, which the registry calls.
pub struct Scenario {
    /// `module::what_holds_kernel`: what filters on the command line match.
    pub name: String,
    /// The part inside the test bed.
    pub in_bed: InBed,
    /// How long the part inside the test bed may take.
    pub limit: Duration,
    /// The part on the host before the bed starts, if any.
    pub prepare: Option<Prepare>,
    /// The part on the host while the bed runs, if any.
    pub meanwhile: Option<Meanwhile>,
    /// The part on the host after the bed has ended, if any.
    pub then: Option<Then>,
    /// Whether this run has it.
    pub is_wanted: bool,
}

impl Scenario {
    /// A scenario that every run has and that needs nothing on the host.
    pub fn new(
        name: impl Into<String>,
        in_bed: impl Fn(&Fixture) -> Result<()> + Send + Sync + 'static,
    ) -> Scenario {
        Scenario {
            name: name.into(),
            in_bed: Box::new(in_bed),
            limit: DEFAULT_LIMIT,
            prepare: None,
            meanwhile: None,
            then: None,
            is_wanted: true,
        }
    }

    /// Replaces the default time limit.
    pub fn limit(self, limit: Duration) -> Scenario {
        Scenario { limit, ..self }
    }

    /// Leaves the scenario to runs that satisfy `condition`.
    pub fn only_if(self, condition: bool) -> Scenario {
        let is_wanted = self.is_wanted && condition;
        Scenario { is_wanted, ..self }
    }

    /// Leaves the scenario to runs of all scenarios if it is `extra`: one of a kind of which a
    /// plain run has others.
    pub fn extra_if(self, extra: bool) -> Scenario {
        self.only_if(!extra || is_all_requested())
    }

    /// Runs `prepare` on the host before the bed starts.
    pub fn prepare(
        self,
        prepare: impl Fn(&mut Assets) -> Result<()> + Send + Sync + 'static,
    ) -> Scenario {
        let prepare: Option<Prepare> = Some(Box::new(prepare));
        Scenario { prepare, ..self }
    }

    /// Runs `meanwhile` on the host, where nothing is emulated, while the bed runs.
    pub fn meanwhile(
        self,
        meanwhile: impl Fn(&Assets, &Path, &AtomicBool) -> Result<()> + Send + Sync + 'static,
    ) -> Scenario {
        let meanwhile: Option<Meanwhile> = Some(Box::new(meanwhile));
        Scenario { meanwhile, ..self }
    }

    /// Runs `then` on the host, where nothing is emulated, after the bed has succeeded.
    pub fn then(
        self,
        then: impl Fn(&Assets, &Path) -> Result<()> + Send + Sync + 'static,
    ) -> Scenario {
        let then: Option<Then> = Some(Box::new(then));
        Scenario { then, ..self }
    }
}

/// Whether the environment requests every scenario on each kernel that it is for.
pub fn is_all_requested() -> bool {
    env::var_os(ALL).is_some()
}
