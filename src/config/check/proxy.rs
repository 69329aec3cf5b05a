//! From what was written to what can be served: the proxy port.
//!
//! Knows what guards the port and what a caller may take of a pod. Must not know how
//! either is enforced. The invariant it keeps: a port that others can reach is guarded,
//! or somebody wrote that it is meant to be open.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_saphyr::Spanned;

use super::{Check, Setting, is_loopback, loopback, unseen_credential};
use crate::config::named::{self, Pair};
use crate::config::scalar::size;
use crate::config::{Bounds, Flags, Listen, PROXY_PORT, Proxy, Secret, Tls, file};

impl Check<'_> {
    pub(super) fn proxy(&mut self, file: file::Proxy, fixed_credentials: Vec<Secret>, flags: &Flags) -> Proxy {
        let credentials = file.credentials_file.map(|text| self.written(text, "proxy.credentials_file"));
        let credentials_file = credentials.as_ref().map(|setting| PathBuf::from(&setting.text));
        let mut credentials = credentials.map(|setting| self.credentials(&setting)).unwrap_or_default();
        credentials.extend_from_slice(&fixed_credentials);
        let guarded = file.open || !credentials.is_empty();
        let setting =
            self.pick(&flags.proxy_listen, "--proxy-listen", "QUOTUM_PROXY_LISTEN", file.listen, "proxy.listen");
        let whole = setting.as_ref().map(|setting| Setting {
            text: String::new(),
            place: setting.place.clone(),
            field: setting.field.clone(),
        });
        let listen = self.listen(setting);
        if let (Some(at), Some(whole)) = (listen, whole)
            && !guarded
            && !is_loopback(at)
        {
            self.wrong(
                &whole,
                "others can reach this address, and nobody is asked for a credential; set proxy.credentials_file, \
                 or proxy.open: true if that is meant",
            );
        }
        let tls = file.tls.and_then(|tls| self.tls(tls));
        let upstream_ca = file.upstream_ca.map(|text| self.written(text, "proxy.upstream_ca"));
        let upstream_ca = upstream_ca.and_then(|setting| {
            if self.is_unseen(&setting.field, &setting.text) {
                return None;
            }
            let path = Path::new(&setting.text);
            let found = named::read(path).and_then(|bytes| named::authorities(path, &bytes));
            self.usable(&setting, found)
        });
        let usual = Bounds::default();
        let max_header_bytes = file.max_header_bytes.map(|text| self.written(text, "proxy.max_header_bytes"));
        let max_header_bytes = self.parsed(max_header_bytes, |text| match size(text)? {
            bytes if (4 << 10..=1 << 20).contains(&bytes) => Ok(bytes),
            _ => Err(format!("`{text}` is out of range; it must lie between 4KiB and 1MiB")),
        });
        let max_body = file.max_body.map(|text| self.written(text, "proxy.max_body"));
        let max_body = self.parsed(max_body, size).unwrap_or(32 << 20);
        let max_bodies = file.max_bodies.map(|text| self.written(text, "proxy.max_bodies"));
        let max_bodies = self.parsed(max_bodies, |text| match size(text)? {
            bytes if bytes >= max_body => Ok(bytes),
            _ => Err(format!("`{text}` is less than the {max_body} bytes of proxy.max_body, which must fit in")),
        });
        let hour = Duration::from_secs(3_600);
        let linger = self.pick(&None, "", "QUOTUM_LINGER", file.linger, "proxy.linger");
        let linger = self.within(linger, (Duration::ZERO, hour));
        let drain = self.pick(&None, "", "QUOTUM_DRAIN", file.drain, "proxy.drain");
        let drain = self.within(drain, (Duration::from_secs(1), hour * 24));
        let times = file.timeouts;
        Proxy {
            listen: listen.unwrap_or(if guarded { Listen::Everywhere(PROXY_PORT) } else { loopback(PROXY_PORT) }),
            credentials,
            fixed_credentials,
            credentials_file,
            tls,
            upstream_ca: upstream_ca.unwrap_or_default(),
            max_body,
            max_bodies: max_bodies.unwrap_or(max_body.max(1 << 30)),
            linger: linger.unwrap_or_default(),
            drain,
            bounds: Bounds {
                connections: self.count(file.max_connections, "max_connections", usual.connections, 1_000_000),
                streams: self.count(file.max_streams, "max_streams", usual.streams, 10_000),
                headers: self.count(file.max_headers, "max_headers", usual.headers, 1_000),
                header_bytes: max_header_bytes.unwrap_or(usual.header_bytes),
                handshake: self.time(times.handshake, "handshake", usual.handshake),
                header: self.time(times.header, "header", usual.header),
                body: self.time(times.body, "body", usual.body),
                body_idle: self.time(times.body_idle, "body_idle", usual.body_idle),
                unread: self.time(times.unread, "unread", usual.unread),
                idle: self.time(times.idle, "idle", usual.idle),
            },
        }
    }

    fn time(&mut self, text: file::Text, name: &str, usual: Duration) -> Duration {
        let range = (Duration::from_millis(100), Duration::from_secs(86_400));
        self.duration(text, &format!("proxy.timeouts.{name}"), usual, range)
    }

    fn count<T: TryFrom<i64>>(&mut self, written: Option<Spanned<i64>>, name: &str, usual: T, most: i64) -> T {
        let Some(written) = written else { return usual };
        let value = written.value;
        match T::try_from(value) {
            Ok(count) if (1..=most).contains(&value) => count,
            _ => {
                let message = format!("{value} is out of range; it must lie between 1 and {most}");
                self.problem(written.referenced, format!("proxy.{name}"), message);
                usual
            }
        }
    }

    fn tls(&mut self, written: Spanned<file::Tls>) -> Option<Tls> {
        let at = written.referenced;
        let certificate = written.value.certificate.map(|text| self.written(text, "proxy.tls.certificate"));
        let key = written.value.key.map(|text| self.written(text, "proxy.tls.key"));
        let (Some(certificate), Some(key)) = (certificate, key) else {
            let message = "needs both files: { certificate: /path/chain.pem, key: /path/key.pem }";
            self.problem(at, "proxy.tls", message);
            return None;
        };
        let unseen = [&certificate, &key].map(|setting| self.is_unseen(&setting.field, &setting.text));
        if unseen.contains(&true) {
            return None;
        }
        let pair = Pair { certificate: (&certificate.text).into(), key: (&key.text).into() };
        let chain = named::read(&pair.certificate).and_then(|bytes| {
            named::certificates(&pair.certificate, &bytes)?;
            Ok(bytes)
        });
        let chain = self.usable(&certificate, chain);
        let secret = self.usable(&key, named::read(&pair.key));
        let certified = pair.parse(&[chain?, secret?]);
        Some(Tls { certified: self.usable(&key, certified)?, pair })
    }

    fn credentials(&mut self, setting: &Setting) -> Vec<Secret> {
        if self.is_unseen(&setting.field, &setting.text) {
            return vec![unseen_credential()];
        }
        let path = Path::new(&setting.text);
        let found = named::read(path).and_then(|bytes| named::credentials(path, &bytes));
        self.usable(setting, found).unwrap_or_default()
    }
}
