//! Which kind and HTTP status each error of the patcher is answered with.

use introspect::{Gva, NotReady};
use patcher::{EncodeError, ModuleError, PatchMemoryError, SiteError};

use super::*;

fn busy() -> PatchError {
    PatchError::Busy {
        what: "tasklist_lock is held for writing".into(),
        tries: 100,
    }
}

fn not_at_once() -> PatchError {
    PatchError::NotAtOnce {
        blocker: "77 sleeper in do_wait+0x5".into(),
        others: 0,
    }
}

fn site(source: SiteError) -> PatchError {
    PatchError::Site {
        function: "memcpy".into(),
        at: Gva(0xffff_ffff_8100_0000),
        source,
    }
}

fn module(error: ModuleError) -> PatchError {
    LinkError::Module(error).into()
}

/// The kind, the HTTP status and the advice for an error of a running guest.
fn answered(error: &PatchError) -> (Kind, u16, String) {
    let problem = problem(error, VmState::Running);
    assert_eq!(
        problem.error,
        error.to_string(),
        "not in the patcher's words"
    );
    (problem.kind, problem.kind.status().as_u16(), problem.detail)
}

#[test]
fn errors_keep_the_patchers_words() {
    let (kind, status, _) = answered(&PatchError::NoSuchTask(7));
    assert_eq!((kind, status), (Kind::NotFound, 404));
}

#[test]
fn each_kind_of_error_has_its_status() {
    let to = Gva(0xffff_ffff_8100_0000);
    let wrong_version = LinkError::Vermagic {
        module: "6.1.0".into(),
        kernel: "6.12.0".into(),
        symbol: None,
    };
    let cases = [
        (module(ModuleError::NotElf), Kind::BadModule, 400),
        (module(ModuleError::NotLivepatch), Kind::BadModule, 400),
        (wrong_version.into(), Kind::BadModule, 400),
        (
            LinkError::UnknownSymbol("x".into()).into(),
            Kind::BadModule,
            400,
        ),
        (PatchError::NoSuchTask(7), Kind::NotFound, 404),
        (PatchError::NoSuchPatch("fix".into()), Kind::NotFound, 404),
        (
            PatchError::AlreadyApplied("fix".into()),
            Kind::Conflict,
            409,
        ),
        (PatchError::LoadedInGuest("fix".into()), Kind::Conflict, 409),
        (PatchError::InTransition("fix".into()), Kind::Conflict, 409),
        (PatchError::NoTransition("fix".into()), Kind::Conflict, 409),
        (not_at_once(), Kind::Conflict, 409),
        (
            site(SiteError::Used("a kprobe".into())),
            Kind::Conflict,
            409,
        ),
        (
            PatchMemoryError::NoHiddenWindow { max: 16 }.into(),
            Kind::Conflict,
            409,
        ),
        (busy(), Kind::Unavailable, 503),
        (
            PatchError::TooManyTasks { max: 512 },
            Kind::Unavailable,
            503,
        ),
        (
            PatchError::AnotherKernel("6.1.0-1".into()),
            Kind::Unavailable,
            503,
        ),
        (
            PatchError::NotReady(NotReady::NoImage),
            Kind::Unavailable,
            503,
        ),
        (LinkError::Booting.into(), Kind::Unavailable, 503),
        (
            MachineError::Vcpu("it is stuck".into()).into(),
            Kind::Internal,
            500,
        ),
        (PatchMemoryError::NotMapped(to).into(), Kind::Internal, 500),
        (site(SiteError::Endless), Kind::Internal, 500),
        (PatchError::Internal("no patch"), Kind::Internal, 500),
    ];
    for (error, kind, status) in cases {
        let (found, code, _) = answered(&error);
        assert_eq!((found, code), (kind, status), "{error}");
    }
}

/// What outpatch cannot do stays so: neither another module of the same source nor another attempt
/// helps.
#[test]
fn what_is_not_supported_is_unprocessable() {
    let at = Gva(0xffff_ffff_8100_0000);
    let section = ModuleError::Section {
        section: "__bug_table".into(),
        functions: Vec::new(),
        why: "it has WARN or BUG",
    };
    let dropped = LinkError::Dropped {
        at: "new+0x73".into(),
        to: "__this_module".into(),
        section: ".gnu.linkonce.this_module".into(),
    };
    let key = LinkError::StaticKey {
        function: "new".into(),
        key: "key".into(),
    };
    let errors = [
        module(ModuleError::Dependencies("nf_tables".into())),
        module(ModuleError::Format("kpatch-build")),
        module(section),
        module(ModuleError::ModuleTarget("ext4".into())),
        module(ModuleError::Callbacks("pre_patch".into())),
        module(ModuleError::States),
        module(ModuleError::TooMany {
            what: "bytes of code or data",
            count: 17 << 20,
            max: 16 << 20,
        }),
        dropped.into(),
        key.into(),
        site(SiteError::None),
        PatchError::Unsupported("the fake signal needs CONFIG_LIVEPATCH in the guest"),
        PatchMemoryError::TooLarge {
            bytes: 3 << 20,
            max: 2 << 20,
        }
        .into(),
        PatchMemoryError::NoEntry.into(),
        EncodeError::OutOfReach { from: at, to: at }.into(),
    ];
    for error in errors {
        let (kind, status, detail) = answered(&error);
        assert_eq!((kind, status), (Kind::Unsupported, 422), "{error}");
        for wrong in ["try again", "exactly this guest's kernel", "GET /patches"] {
            assert!(!detail.contains(wrong), "{error}; {detail}");
        }
    }
}

#[test]
fn what_may_be_tried_again_says_so() {
    for error in [busy(), PatchError::AnotherKernel("6.1.0-1".into())] {
        let (_, _, detail) = answered(&error);
        assert!(detail.contains("try again"), "{error}; {detail}");
    }
}

#[test]
fn a_paused_guest_is_called_paused_and_not_busy() {
    let not_ready = PatchError::NotReady(NotReady::Booting(1));
    let booting = LinkError::Booting.into();
    for error in [busy(), not_ready, booting, not_at_once()] {
        let paused = problem(&error, VmState::Paused);
        assert_eq!(paused.kind, Kind::Conflict, "{error}");
        assert!(
            paused.error.starts_with("the guest is paused"),
            "{}",
            paused.error
        );
        assert!(!paused.error.contains("busy"), "{}", paused.error);
        assert!(paused.detail.contains("outpatch resume"));
    }
    let in_the_middle = problem(&busy(), VmState::Paused).error;
    assert!(
        in_the_middle.contains("tasklist_lock is held"),
        "{in_the_middle}"
    );
    // What has nothing to do with the pause is as in a running guest.
    let other = PatchError::NoSuchTask(7);
    assert_eq!(
        problem(&other, VmState::Paused),
        problem(&other, VmState::Running)
    );
}
