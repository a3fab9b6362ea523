//! The routes: what each request does, and what it answers.
//!
//! This module only translates between HTTP and [`Control`](crate::api::control::Control); the API
//! thread must not touch the guest.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, on};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use patcher::{CheckReport, PatchStatus};
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::api::control::{Mailbox, find};
use crate::api::metrics;
use crate::api::problem::{Kind, Problem};
use crate::api::types;
use crate::api::wait::WaitFor;

/// The largest livepatch module accepted, in bytes.
pub const MAX_MODULE: usize = 64 << 20;

/// The largest JSON body accepted, in bytes.
const MAX_JSON: usize = 64 << 10;

/// The most modules held at a time; with [`MAX_MODULE`] this bounds the memory of uploads.
const MAX_UPLOADS: usize = 2;

/// The advice for a query that is not [`types::ApplyQuery`].
const APPLY_QUERY: &str =
    "the parameters are mode (per-task, stop-machine or auto), wait_ms and tasks (all or pending)";

/// The advice for a query that is not [`types::PatchQuery`].
const PATCH_QUERY: &str = "the parameters are wait_ms and tasks (all or pending)";

/// What the handlers share.
#[derive(Clone, Debug)]
pub(super) struct App {
    mailbox: Mailbox,
    uploads: Arc<Semaphore>,
    /// How long a request's body may take to arrive.
    body_timeout: Duration,
}

/// A route.
#[derive(Debug)]
pub(super) struct Route {
    /// The HTTP method.
    pub method: Method,
    /// The path, with `{…}` for a segment that varies.
    pub path: &'static str,
    handler: fn(MethodFilter) -> MethodRouter<App>,
}

/// All routes; `docs/ABI` describes each.
#[rustfmt::skip]
pub(super) const ROUTES: &[Route] = &[
    Route { method: Method::GET, path: "/version", handler: |m| on(m, version) },
    Route { method: Method::GET, path: "/vm", handler: |m| on(m, vm) },
    Route { method: Method::PATCH, path: "/vm", handler: |m| on(m, change_vm) },
    Route { method: Method::DELETE, path: "/vm", handler: |m| on(m, stop_vm) },
    Route { method: Method::GET, path: "/tasks", handler: |m| on(m, tasks) },
    Route { method: Method::GET, path: "/tasks/{pid}/stack", handler: |m| on(m, stack) },
    Route { method: Method::GET, path: "/stacks", handler: |m| on(m, stacks) },
    Route { method: Method::GET, path: "/symbols", handler: |m| on(m, symbols) },
    Route { method: Method::POST, path: "/dumps", handler: |m| on(m, dump) },
    Route { method: Method::POST, path: "/checks", handler: |m| on(m, check) },
    Route { method: Method::GET, path: "/patches", handler: |m| on(m, patches) },
    Route { method: Method::POST, path: "/patches", handler: |m| on(m, apply) },
    Route { method: Method::GET, path: "/patches/{name}", handler: |m| on(m, patch) },
    Route { method: Method::PATCH, path: "/patches/{name}", handler: |m| on(m, change_patch) },
    Route { method: Method::GET, path: "/metrics", handler: |m| on(m, metrics) },
];

/// The service of all routes.
pub(super) fn router(mailbox: Mailbox, body_timeout: Duration) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        match MethodFilter::try_from(route.method.clone()) {
            Ok(filter) => router = router.route(route.path, (route.handler)(filter)),
            Err(error) => tracing::error!("{} {}: {error}", route.method, route.path),
        }
    }
    router
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(App {
            mailbox,
            uploads: Arc::new(Semaphore::new(MAX_UPLOADS)),
            body_timeout,
        })
}

async fn version() -> Json<types::Version> {
    Json(types::Version {
        name: "outpatch".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

async fn vm(State(app): State<App>) -> Result<Json<types::Vm>, Problem> {
    Ok(Json(app.mailbox.read(|c| c.vm()).await?))
}

async fn change_vm(State(app): State<App>, body: Body) -> Result<Json<types::Vm>, Problem> {
    let types::VmChange { state } = app.json(body).await?;
    let change = app
        .mailbox
        .change(move |c| c.set_state(state).map(|()| c.vm()));
    Ok(Json(change.await??))
}

/// Answers 202, as the answer must be sent before the VMM ends.
async fn stop_vm(State(app): State<App>) -> Result<impl IntoResponse, Problem> {
    let vm = app.mailbox.change(|c| {
        let vm = c.vm();
        c.stop().map(|()| vm)
    });
    Ok((StatusCode::ACCEPTED, Json(vm.await??)))
}

async fn tasks(State(app): State<App>) -> Result<Json<Vec<types::Task>>, Problem> {
    Ok(Json(app.mailbox.read(|c| c.tasks()).await??))
}

async fn stack(
    State(app): State<App>,
    Path(pid): Path<String>,
) -> Result<Json<types::TaskStack>, Problem> {
    let pid: i32 = pid.parse().map_err(|_| {
        Problem::new(
            Kind::BadRequest,
            format!("{pid:?} is not a pid"),
            "give a thread id, as in GET /tasks",
        )
    })?;
    Ok(Json(app.mailbox.read(move |c| c.stack(pid)).await??))
}

async fn stacks(State(app): State<App>) -> Result<Json<Vec<types::TaskStack>>, Problem> {
    Ok(Json(app.mailbox.read(|c| c.stacks()).await??))
}

async fn symbols(State(app): State<App>) -> Result<Json<Vec<types::Symbol>>, Problem> {
    Ok(Json(app.mailbox.read(|c| c.symbols()).await??))
}

async fn dump(State(app): State<App>, body: Body) -> Result<impl IntoResponse, Problem> {
    let types::NewDump { path } = app.json(body).await?;
    let dump = app.mailbox.read(move |c| c.dump(path.as_ref()));
    Ok((StatusCode::CREATED, Json(dump.await??)))
}

async fn patches(State(app): State<App>) -> Result<Json<Vec<PatchStatus>>, Problem> {
    Ok(Json(app.mailbox.read(|c| c.patches()).await?))
}

async fn patch(
    State(app): State<App>,
    Path(name): Path<String>,
    query: Result<Query<types::PatchQuery>, QueryRejection>,
) -> Result<Json<PatchStatus>, Problem> {
    let wait = WaitFor::new(&app.mailbox, parsed(query, PATCH_QUERY)?)?;
    let patch = app.mailbox.patch(name).await?;
    Ok(Json(wait.until_ended(patch).await?))
}

/// Creates no resource: the report is the whole answer.
async fn check(
    State(app): State<App>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<CheckReport>, Problem> {
    let upload = app.upload(&headers, body).await?;
    let check = app.mailbox.read(move |c| c.check(&upload.module));
    Ok(Json(check.await??))
}

async fn apply(
    State(app): State<App>,
    query: Result<Query<types::ApplyQuery>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<impl IntoResponse, Problem> {
    let types::ApplyQuery {
        mode,
        wait_ms,
        tasks,
    } = parsed(query, APPLY_QUERY)?;
    let wait = WaitFor::new(&app.mailbox, types::PatchQuery { wait_ms, tasks })?;
    let upload = app.upload(&headers, body).await?;
    let status = app.mailbox.change(move |control| {
        let name = control.apply(&upload.module, mode)?;
        drop(upload);
        find(control.patches(), &name)
    });
    let status = wait.until_ended(status.await??).await?;
    let mut answer = HeaderMap::new();
    if let Ok(location) = HeaderValue::from_str(&format!("/patches/{}", status.name)) {
        answer.insert(header::LOCATION, location);
    }
    Ok((StatusCode::CREATED, answer, Json(status)))
}

async fn change_patch(
    State(app): State<App>,
    Path(name): Path<String>,
    query: Result<Query<types::PatchQuery>, QueryRejection>,
    body: Body,
) -> Result<Json<PatchStatus>, Problem> {
    let wait = WaitFor::new(&app.mailbox, parsed(query, PATCH_QUERY)?)?;
    let change: types::PatchChange = app.json(body).await?;
    check_change(&change)?;
    let change = app.mailbox.change(move |control| {
        let before = find(control.patches(), &name)?;
        let name = before.name;
        match (change.enabled, before.enabled) {
            (Some(false), true) => control.revert(&name, change.mode.unwrap_or_default())?,
            (Some(true), false) => {
                return Err(Problem::new(
                    Kind::Conflict,
                    format!("{name} is not applied"),
                    "apply its module again with POST /patches",
                ));
            }
            _ => {}
        }
        if change.cancel.is_some() {
            control.cancel(&name)?;
        }
        if change.force.is_some() {
            control.force(&name)?;
        }
        if change.signal.is_some() {
            let after = Duration::from_millis(change.signal_after_ms.unwrap_or(0));
            control.signal(&name, after)?;
        }
        find(control.patches(), &name)
    });
    Ok(Json(wait.until_ended(change.await??).await?))
}

/// Refuses a contradictory change before any part of it is made.
fn check_change(change: &types::PatchChange) -> Result<(), Problem> {
    let types::PatchChange {
        enabled,
        mode,
        cancel,
        force,
        signal,
        signal_after_ms,
    } = *change;
    let wrong = if [enabled, cancel, force, signal].iter().flatten().count() == 0 {
        "the body changes nothing"
    } else if [cancel, force, signal].contains(&Some(false)) {
        "cancel, force and signal can only be true: they cannot be undone"
    } else if mode.is_some() && enabled.is_none() {
        "mode is only valid with enabled"
    } else if signal_after_ms.is_some() && signal.is_none() {
        "signal_after_ms is only valid with signal"
    } else if [enabled, cancel, force].iter().flatten().count() > 1 {
        "only one of enabled, cancel and force can be given"
    } else {
        return Ok(());
    };
    Err(Problem::new(
        Kind::BadRequest,
        wrong,
        "give `enabled`, `cancel`, `force` or `signal`",
    ))
}

async fn metrics(State(app): State<App>) -> Result<Response, Problem> {
    let (vm, patches) = app.mailbox.read(|c| (c.vm(), c.patches())).await?;
    let kind = [(header::CONTENT_TYPE, metrics::CONTENT_TYPE)];
    Ok((kind, metrics::render(&vm, &patches)).into_response())
}

/// The query, or an error with this advice.
fn parsed<T>(query: Result<Query<T>, QueryRejection>, detail: &'static str) -> Result<T, Problem> {
    match query {
        Ok(Query(query)) => Ok(query),
        Err(rejected) => Err(Problem::new(Kind::BadRequest, rejected.body_text(), detail)),
    }
}

async fn no_route() -> Problem {
    Problem::new(
        Kind::NotFound,
        "no such resource",
        "the resources are /version, /vm, /tasks, /symbols, /dumps, /checks, /patches and /metrics",
    )
}

async fn no_method() -> Problem {
    Problem::new(
        Kind::MethodNotAllowed,
        "this resource does not have this method",
        "the Allow header lists its methods",
    )
}

/// Whether the body may be a module: its content type says so, or is missing. A web browser's form
/// or JSON is not a module.
///
/// Media types have no case, and may be followed by parameters (RFC 9110, 8.3.1).
fn is_module(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_none_or(|kind| {
        let mut parts = kind.as_bytes().split(|byte| *byte == b';');
        let media_type = parts.next().unwrap_or_default().trim_ascii();
        media_type.eq_ignore_ascii_case(b"application/octet-stream")
    })
}

fn too_large(limit: usize) -> Problem {
    let error = format!("the body is longer than {limit} bytes");
    Problem::new(Kind::TooLarge, error, "send a smaller body")
}

/// A received module.
struct Upload {
    module: Bytes,
    /// Released when the module is dropped.
    _permit: OwnedSemaphorePermit,
}

impl App {
    /// Receives the module in a body, unless [`MAX_UPLOADS`] others are held.
    async fn upload(&self, headers: &HeaderMap, body: Body) -> Result<Upload, Problem> {
        if !is_module(headers) {
            return Err(Problem::new(
                Kind::BadRequest,
                "the content type is not that of a module",
                "send the .ko file itself with Content-Type: application/octet-stream",
            ));
        }
        let permit = self.uploads.clone().try_acquire_owned().map_err(|_| {
            Problem::new(
                Kind::Unavailable,
                "too many other modules are being received",
                "try again in a second",
            )
        })?;
        Ok(Upload {
            module: self.body(body, MAX_MODULE).await?,
            _permit: permit,
        })
    }

    /// Receives a body of at most `limit` bytes, within the time for bodies.
    async fn body(&self, body: Body, limit: usize) -> Result<Bytes, Problem> {
        // A body that is announced as too long is refused without reading it.
        let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        if announced > limit {
            return Err(too_large(limit));
        }
        let collect = Limited::new(body, limit).collect();
        match tokio::time::timeout(self.body_timeout, collect).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large(limit)),
            Ok(Err(error)) => Err(Problem::new(
                Kind::BadRequest,
                format!("the body was cut short: {error}"),
                "send it again",
            )),
            Err(_) => Err(Problem::new(
                Kind::RequestTimeout,
                format!("the body did not arrive in {:?}", self.body_timeout),
                "send it faster",
            )),
        }
    }

    async fn json<T: DeserializeOwned>(&self, body: Body) -> Result<T, Problem> {
        let body = self.body(body, MAX_JSON).await?;
        serde_json::from_slice(&body).map_err(|error| {
            Problem::new(
                Kind::BadRequest,
                format!("the body is not the JSON expected here: {error}"),
                "docs/ABI describes it",
            )
        })
    }
}
