//! The metrics page, in Prometheus' text format.

use std::fmt::Write;

use patcher::{PAUSE_BOUNDS_US, PatchStatus, PauseReport};

use crate::api::types::{Vm, VmState};

/// Version 0.0.4 of the format.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The page. The pause comes first: it is what watching costs the guest.
pub(super) fn render(vm: &Vm, patches: &[PatchStatus]) -> String {
    let mut page = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = write!(
            page,
            "# HELP outpatch_{name} {help}\n# TYPE outpatch_{name} {kind}\noutpatch_{name} {value}\n"
        );
    };
    let pauses = &vm.pauses;
    metric(
        "pauses_total",
        "counter",
        "Times that all vCPUs were stopped to look at the guest or to patch it.",
        pauses.count.to_string(),
    );
    metric(
        "pause_seconds_total",
        "counter",
        "Time that all vCPUs were stopped for that.",
        seconds(pauses.total_us),
    );
    metric(
        "pause_longest_seconds",
        "gauge",
        "The longest such pause.",
        seconds(pauses.longest_us),
    );
    metric(
        "vm_running",
        "gauge",
        "1: the operator lets the guest run; 0: it is paused.",
        u8::from(vm.state == VmState::Running).to_string(),
    );
    metric("vcpus", "gauge", "vCPUs of the guest.", vm.cpus.to_string());
    metric(
        "memory_bytes",
        "gauge",
        "RAM of the guest.",
        vm.memory.to_string(),
    );
    let enabled = patches.iter().filter(|p| p.enabled).count();
    metric(
        "patches_enabled",
        "gauge",
        "Patches that are applied or being applied.",
        enabled.to_string(),
    );
    let waiting = patches
        .iter()
        .filter(|p| p.transition)
        .flat_map(|p| &p.tasks)
        .filter(|t| t.switched_by.is_none())
        .count();
    metric(
        "transition_tasks_waiting",
        "gauge",
        "Tasks that the running transition waits for.",
        waiting.to_string(),
    );
    histogram(&mut page, pauses);
    page
}

/// The lengths of pauses, each bound counting all that are no longer.
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

/// Microseconds as Prometheus' base unit, without passing through a float.
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
