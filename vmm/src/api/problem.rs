//! The error of a refused request: what is wrong, what to do about it, and its HTTP status.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::api::types;

/// The kind of an error. Each has one HTTP status; clients distinguish errors by
/// [`word`](Kind::word).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request is malformed or contradictory.
    BadRequest,
    /// The file is not a livepatch for this guest.
    BadModule,
    /// There is no such resource, task or patch.
    NotFound,
    /// The resource does not have this method.
    MethodNotAllowed,
    /// The request does not fit the present state of the guest or of its patches.
    Conflict,
    /// The request took too long to arrive.
    RequestTimeout,
    /// The body is too long.
    TooLarge,
    /// The request is valid, but not supported yet, or not with this guest.
    Unsupported,
    /// The guest is not ready or busy, or there are too many requests: try again.
    Unavailable,
    /// The operation took too long.
    Timeout,
    /// A fault of outpatch or of the VM.
    Internal,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 11] = [
        Kind::BadRequest,
        Kind::BadModule,
        Kind::NotFound,
        Kind::MethodNotAllowed,
        Kind::Conflict,
        Kind::RequestTimeout,
        Kind::TooLarge,
        Kind::Unsupported,
        Kind::Unavailable,
        Kind::Timeout,
        Kind::Internal,
    ];

    /// The kind as a word, as in the field `kind` of an error.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Kind::BadRequest => "bad-request",
            Kind::BadModule => "bad-module",
            Kind::NotFound => "not-found",
            Kind::MethodNotAllowed => "method-not-allowed",
            Kind::Conflict => "conflict",
            Kind::RequestTimeout => "request-timeout",
            Kind::TooLarge => "too-large",
            Kind::Unsupported => "unsupported",
            Kind::Unavailable => "unavailable",
            Kind::Timeout => "timeout",
            Kind::Internal => "internal",
        }
    }

    /// The HTTP status.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Kind::BadRequest | Kind::BadModule => StatusCode::BAD_REQUEST,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Kind::Conflict => StatusCode::CONFLICT,
            Kind::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Kind::Unsupported => StatusCode::UNPROCESSABLE_ENTITY,
            Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// The error that a handler returns for a request that it refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{error} ({detail})")]
pub struct Problem {
    /// The kind, for programs.
    pub kind: Kind,
    /// What is wrong, in one line.
    pub error: String,
    /// What to do about it, in one line.
    pub detail: String,
}

impl Problem {
    /// An error with these texts, in which line breaks become spaces.
    #[must_use]
    pub fn new(kind: Kind, error: impl ToString, detail: impl ToString) -> Problem {
        Problem {
            kind,
            error: one_line(&error.to_string()),
            detail: one_line(&detail.to_string()),
        }
    }
}

fn one_line(text: &str) -> String {
    text.split(['\n', '\r'])
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = Json(types::Problem {
            kind: self.kind.word().to_owned(),
            error: self.error,
            detail: self.detail,
        });
        let mut response = (self.kind.status(), body).into_response();
        if self.kind == Kind::Unavailable {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
