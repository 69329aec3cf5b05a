//! Seeds: how a configuration says where the other replicas are.
//!
//! Knows what can be written and what is wrong with it. Must not know how anything is asked.
//! The invariant it keeps: what it returns names no address twice and no port 0.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use super::{Discovery, Dns, List, MAX_LISTED, Nowhere};
use crate::cluster::socket::{Net, canonical};

/// Where the replicas of the fleet are listed.
#[derive(Clone, Debug)]
pub enum Seeds {
    /// Nowhere: this replica is alone.
    Alone,
    /// Here: every replica, this one among them, one address each.
    Static(Vec<SocketAddr>),
    /// At a headless name, which resolves to the addresses of all replicas.
    Name {
        /// The name.
        host: String,
        /// The UDP port of every replica.
        port: u16,
    },
    /// Wherever this says. Of one's own making, or [`Scripted`](super::Scripted) in a test.
    By(Arc<dyn Discovery>),
}

impl PartialEq for Seeds {
    /// Two discoveries of one's own making are equal if they are one and the same.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Alone, Self::Alone) => true,
            (Self::Static(one), Self::Static(other)) => one == other,
            (Self::Name { host, port }, Self::Name { host: other, port: others }) => (host, port) == (other, others),
            (Self::By(one), Self::By(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl Eq for Seeds {}

impl Seeds {
    /// Returns what these entries, `host:port` each, describe: exactly one entry whose host
    /// is not an IP address is a headless name; all addresses are a static list; none is
    /// alone.
    ///
    /// # Errors
    /// Says which entry is wrong and what to write instead.
    pub fn parse<S: AsRef<str>>(entries: &[S]) -> Result<Self, SeedError> {
        let mut addrs = Vec::new();
        let mut names = Vec::new();
        for entry in entries.iter().map(|entry| entry.as_ref().trim()) {
            match entry.parse::<SocketAddr>() {
                Ok(addr) if addr.port() == 0 => return Err(SeedError::Port(entry.into())),
                Ok(addr) if addrs.contains(&canonical(addr)) => return Err(SeedError::Repeated(addr)),
                Ok(addr) => addrs.push(canonical(addr)),
                Err(_) => names.push(parse_name(entry)?),
            }
        }
        if addrs.len() > MAX_LISTED {
            return Err(SeedError::TooMany(addrs.len()));
        }
        match (addrs.is_empty(), names.pop()) {
            (true, None) => Ok(Self::Alone),
            (false, None) => Ok(Self::Static(addrs)),
            (true, Some((host, port))) if names.is_empty() => Ok(Self::Name { host, port }),
            (_, Some((host, _))) => Err(SeedError::Mixed(host)),
        }
    }

    /// Returns what asks there.
    pub(crate) fn discovery<N: Net>(&self, net: &Arc<N>) -> Arc<dyn Discovery> {
        match self {
            Self::Alone => Arc::new(Nowhere),
            Self::Static(addrs) => Arc::new(List::new(addrs.clone())),
            Self::Name { host, port } => Arc::new(Dns::new(Arc::clone(net), host, *port)),
            Self::By(discovery) => Arc::clone(discovery),
        }
    }
}

impl fmt::Display for Seeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alone => f.write_str("no seeds"),
            Self::Static(addrs) => write!(f, "a list of {} replicas", addrs.len()),
            Self::Name { host, port } => write!(f, "the headless name {host}:{port}"),
            Self::By(discovery) => write!(f, "{discovery:?}"),
        }
    }
}

/// Why seeds were refused. Whoever configured them can mend it; nothing was started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SeedError {
    /// An entry is not `host:port`.
    #[error(
        "the seed {0:?} is not host:port; write an address like 10.0.0.7:7946, or a name like quotum-headless:7946"
    )]
    Entry(String),
    /// An entry has port 0.
    #[error("the seed {0:?} has port 0; write the UDP port that the replica gossips on, 7946 by default")]
    Port(String),
    /// A name stands beside other entries.
    #[error(
        "the seed {0:?} is a name beside other seeds; write either one headless name or the addresses of all replicas"
    )]
    Mixed(String),
    /// An address is there twice.
    #[error("the seed {0} is there twice; write each replica once")]
    Repeated(SocketAddr),
    /// There are too many.
    #[error("{0} seeds are more than the {MAX_LISTED} replicas a fleet can have; use a headless name")]
    TooMany(usize),
    /// The list does not name this replica.
    #[error(
        "the seeds do not list this replica, {advertise}; a static list names every replica: add it, or set gossip.advertise to the listed address"
    )]
    NotListed {
        /// The address this replica goes by.
        advertise: SocketAddr,
    },
    /// The port is any free one, so no list can name it.
    #[error("gossip.listen has port 0, which no list of seeds can name; write the port that the seeds name")]
    ListenPort,
}

fn parse_name(entry: &str) -> Result<(String, u16), SeedError> {
    let wrong = || SeedError::Entry(entry.into());
    let (host, port) = entry.rsplit_once(':').ok_or_else(wrong)?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    // A host of digits and dots is an address with a slip in it, not a name.
    let name = host.bytes().all(plain) && host.bytes().any(|byte| byte.is_ascii_alphabetic());
    if !name || host.len() > 253 {
        return Err(wrong());
    }
    match port.parse::<u16>() {
        Ok(0) => Err(SeedError::Port(entry.into())),
        Ok(port) => Ok((host.into(), port)),
        Err(_) => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_a_name_or_a_list_or_nothing() {
        assert_eq!(Seeds::parse::<&str>(&[]), Ok(Seeds::Alone));
        let list = Seeds::parse(&["10.0.0.1:7946", "[::ffff:10.0.0.2]:7946"]).unwrap();
        assert_eq!(list, Seeds::Static(vec![([10, 0, 0, 1], 7946).into(), ([10, 0, 0, 2], 7946).into()]));
        let name = Seeds::parse(&["quotum-headless.prod.svc:7946"]).unwrap();
        assert_eq!(name, Seeds::Name { host: "quotum-headless.prod.svc".into(), port: 7946 });
    }

    #[test]
    fn seeds_that_cannot_be_are_refused_with_what_is_wrong() {
        let error = |seeds: &[&str]| Seeds::parse(seeds).unwrap_err();
        assert_eq!(error(&["quotum"]), SeedError::Entry("quotum".into()));
        assert_eq!(error(&["10.0.0.256:7946"]), SeedError::Entry("10.0.0.256:7946".into()));
        assert_eq!(error(&["10.0.0.1:0"]), SeedError::Port("10.0.0.1:0".into()));
        assert_eq!(error(&["quotum:0"]), SeedError::Port("quotum:0".into()));
        assert_eq!(error(&["a:1", "b:1"]), SeedError::Mixed("b".into()));
        assert_eq!(error(&["a:1", "10.0.0.1:1"]), SeedError::Mixed("a".into()));
        let twice = error(&["10.0.0.1:1", "10.0.0.1:1"]);
        assert_eq!(twice, SeedError::Repeated(([10, 0, 0, 1], 1).into()));
    }
}
