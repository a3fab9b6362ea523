//! Arguments that several commands share, and how their values are read.

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use patcher::Mode;
use vmm::client::Client;

/// Which VMM to talk to, and how to print its answers.
#[derive(Debug, Args)]
pub struct Target {
    /// The control socket of the VMM, as given to `outpatch run --socket`.
    #[arg(long, value_name = "PATH", env = "OUTPATCH_SOCKET")]
    socket: PathBuf,
    /// Print the API's JSON instead of text.
    #[arg(long)]
    pub json: bool,
}

/// How tasks switch in a transition, and how to wait for it.
#[derive(Debug, Args)]
pub struct Waiting {
    /// How tasks switch: `per-task`, each as soon as it can; `stop-machine`, all in one pause or
    /// not at all; `auto`, all in one pause if possible, otherwise per task.
    #[arg(long, value_name = "MODE", value_parser = mode, default_value = "per-task")]
    pub mode: Mode,
    /// Send the fake signal to tasks that have not switched after this time.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    pub signal_after: Option<Duration>,
    #[command(flatten)]
    pub following: Following,
}

/// How to wait for a transition, and what to print meanwhile.
#[derive(Clone, Debug, Default, Args)]
pub struct Following {
    /// Return without waiting for the transition to complete.
    #[arg(long, conflicts_with = "timeout")]
    pub no_wait: bool,
    /// Stop waiting after this time, with exit status 4; the transition continues. `apply` also
    /// gives up reading the module after this time, with exit status 1.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// Print a line for each task as it switches, and for every task that blocks the transition.
    #[arg(short, long)]
    pub verbose: bool,
}

impl Target {
    /// A client of that VMM; it connects with its first request.
    ///
    /// # Errors
    /// When the operating system gives no event queue.
    pub fn connect(&self) -> io::Result<Client> {
        Client::new(&self.socket)
    }
}

impl Following {
    /// Does not wait at all.
    pub fn not_waiting() -> Following {
        Following {
            no_wait: true,
            ..Following::default()
        }
    }
}

/// The name of a patch, which is its module's name as the kernel has it. Also read from the name of
/// the module's file or a path to it; `-` is the same as `_`, as for modprobe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatchName(String);

impl PatchName {
    /// The module's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PatchName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<PatchName, Self::Err> {
        let file = text.rsplit('/').next().unwrap_or(text);
        match file.strip_suffix(".ko").unwrap_or(file) {
            "" => Err("not the name of a patch"),
            name => Ok(PatchName(name.replace('-', "_"))),
        }
    }
}

/// A mode, by its name in the API.
fn mode(text: &str) -> Result<Mode, String> {
    serde_json::from_value(serde_json::Value::from(text))
        .map_err(|_| "choose per-task, stop-machine or auto".to_owned())
}

/// A number of seconds, which may have a fraction.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_can_be_named_as_its_file_is() {
        for text in [
            "livepatch_sample",
            "livepatch-sample",
            "livepatch-sample.ko",
            "livepatch_sample.ko",
            "./livepatch-sample.ko",
            "/lib/modules/some-path/livepatch-sample.ko",
        ] {
            let name: PatchName = text.parse().unwrap();
            assert_eq!(name.as_str(), "livepatch_sample", "{text}");
        }
        for text in ["", ".ko", "/", "build/", "build/.ko"] {
            assert!(text.parse::<PatchName>().is_err(), "{text:?}");
        }
    }
}
