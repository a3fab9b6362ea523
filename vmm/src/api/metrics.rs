//! The page of `GET /metrics`, in Prometheus' text format.

use std::fmt::Write;

use patcher::{PAUSE_BOUNDS_US, PatchStatus, PauseReport};

use crate::api::types::{Vm, VmState};

/// The content type of the format, version 0.0.4.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders the page. Pauses come first: they are what outpatch costs the guest.
pub(super) fn render(vm: &Vm, patches: &[PatchStatus]) -> String {
    let mut page = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = write!(
            page,
            "# HELP outpatch_{name} {help}\n\
             # TYPE outpatch_{name} {kind}\n\
             outpatch_{name} {value}\n"
        );
    };
    let pauses = &vm.pauses;
    metric(
        "pauses_total",
        "counter",
        "Number of times all vCPUs were paused to read the guest or to patch it.",
        pauses.count.to_string(),
    );
    metric(
        "pause_seconds_total",
        "counter",
        "Total length of these pauses.",
        seconds(pauses.total_us),
    );
    metric(
        "pause_longest_seconds",
        "gauge",
        "Length of the longest of these pauses.",
        seconds(pauses.longest_us),
    );
    metric(
        "vm_running",
        "gauge",
        "1: the guest runs; 0: the operator has paused it, or its kernel has panicked.",
        u8::from(vm.state == VmState::Running).to_string(),
    );
    metric(
        "vcpus",
        "gauge",
        "Number of vCPUs of the guest.",
        vm.cpus.to_string(),
    );
    metric(
        "memory_bytes",
        "gauge",
        "Size of the guest's RAM.",
        vm.memory.to_string(),
    );
    let enabled = patches.iter().filter(|p| p.enabled).count();
    metric(
        "patches_enabled",
        "gauge",
        "Patches that are applied or being applied.",
        enabled.to_string(),
    );
    let pending = patches
        .iter()
        .filter(|p| p.transition)
        .flat_map(|p| &p.tasks)
        .filter(|t| t.switched_by.is_none())
        .count();
    metric(
        "transition_tasks_pending",
        "gauge",
        "Tasks that have not switched in the running transition.",
        pending.to_string(),
    );
    histogram(&mut page, pauses);
    page
}

/// Renders the lengths of pauses; each bucket counts all pauses up to its bound.
fn histogram(page: &mut String, pauses: &PauseReport) {
    const NAME: &str = "outpatch_pause_seconds";
    let mut line = |text: String| {
        page.push_str(&text);
        page.push('\n');
    };
    line(format!("# HELP {NAME} Lengths of these pauses."));
    line(format!("# TYPE {NAME} histogram"));
    let mut so_far = 0;
    for (bound, count) in PAUSE_BOUNDS_US.iter().zip(pauses.histogram) {
        so_far += count;
        line(format!(
            "{NAME}_bucket{{le=\"{}\"}} {so_far}",
            seconds(*bound)
        ));
    }
    line(format!("{NAME}_bucket{{le=\"+Inf\"}} {}", pauses.count));
    line(format!("{NAME}_sum {}", seconds(pauses.total_us)));
    line(format!("{NAME}_count {}", pauses.count));
}

/// Microseconds in Prometheus' base unit, converted without a float.
fn seconds(us: u64) -> String {
    format!("{}.{:06}", us / 1_000_000, us % 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn microseconds_are_seconds_to_the_last_digit() {
        assert_eq!(seconds(0), "0.000000");
        assert_eq!(seconds(52), "0.000052");
        assert_eq!(seconds(3_000_001), "3.000001");
        assert_eq!(seconds(u64::MAX), "18446744073709.551615");
    }
}
