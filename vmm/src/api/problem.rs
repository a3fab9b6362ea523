//! A refusal: what went wrong, what to do about it, and its HTTP status.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::api::types;

/// What sort of refusal; each has one HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request makes no sense.
    BadRequest,
    /// The file is not a livepatch for this guest.
    BadModule,
    /// There is no such thing.
    NotFound,
    /// There is no such method here.
    MethodNotAllowed,
    /// Not in the present state of the guest or of its patches.
    Conflict,
    /// The request took too long to arrive.
    RequestTimeout,
    /// The body is too long.
    TooLarge,
    /// Right, but not supported yet, or not with this guest.
    Unsupported,
    /// The guest is not ready, or others are before you: try again.
    Unavailable,
    /// The guest took too long.
    Timeout,
    /// Our fault, or the machine's.
    Internal,
}

impl Kind {
    /// All of them.
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

    /// The word for programs.
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

    /// The status.
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

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{error} ({detail})")]
pub struct Problem {
    /// What sort.
    pub kind: Kind,
    /// What is wrong, in one line.
    pub error: String,
    /// What to do about it, in one line.
    pub detail: String,
}

impl Problem {
    /// A refusal; line breaks become spaces, so that each text stays one line.
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
