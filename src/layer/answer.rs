//! How an answer comes, by its head alone.
//!
//! Knows what a status and a content type mean for the charge. Must not know bodies. The
//! invariant it keeps: what an upstream refused to work on costs the request alone.

use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::body::Form;
use super::metering::Charge;

/// Returns how an answer is read, and settles what its status alone decides.
///
/// The length is taken out where the answer is a stream: it changes where an event is hidden.
pub fn form(status: StatusCode, headers: &mut HeaderMap, charge: &mut Charge, hide_usage: bool) -> Form {
    let may_have_worked = matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
    if status.is_client_error() && !may_have_worked {
        charge.settle_rejected();
    }
    if encoding(headers).is_some() {
        Form::Unreadable
    } else if status.is_success() && is_event_stream(headers) {
        headers.remove(header::CONTENT_LENGTH);
        Form::stream(hide_usage)
    } else {
        Form::whole(!status.is_success())
    }
}

/// Returns in what else a body comes than in what it says it is.
pub fn encoding(headers: &HeaderMap) -> Option<&[u8]> {
    let encodings = headers.get_all(header::CONTENT_ENCODING).iter().map(HeaderValue::as_bytes);
    encodings.map(<[u8]>::trim_ascii).find(|encoding| !encoding.eq_ignore_ascii_case(b"identity"))
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    media_type(content_type).eq_ignore_ascii_case(b"text/event-stream")
}

/// Returns a content type without its parameters.
pub fn media_type(content_type: &[u8]) -> &[u8] {
    content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii()
}
