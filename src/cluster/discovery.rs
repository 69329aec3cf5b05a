//! Where the other replicas are: the directory of docs/algorithm.md section 1, and the address that
//! this replica goes by.
//!
//! Knows seeds and how a name is resolved and how often. Must not know who has answered or
//! what follows from an absence: it reports complete answers, the roster draws the
//! conclusions. The invariant it keeps: what it reports is one whole answer of the
//! directory, never a part of one or two put together.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::socket::{Net, canonical};

/// How often a headless name is asked for once every listed address has answered.
pub const LOOKUP_EVERY: Duration = Duration::from_secs(5);

/// How often it is asked for while somebody is missing, or no answer lists us yet.
pub const LOOKUP_EVERY_JOINING: Duration = Duration::from_secs(1);

/// An answer that takes longer than this is given up: the system's resolver retries for
/// tens of seconds, and an old answer proves little.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// The most addresses of an answer or a list that are looked at, as docs/algorithm.md section 1 bounds |U|.
pub const MAX_LISTED: usize = 4_096;

/// Where the replicas of the fleet are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
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
}

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
}

impl fmt::Display for Seeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alone => f.write_str("no seeds"),
            Self::Static(addrs) => write!(f, "a list of {} replicas", addrs.len()),
            Self::Name { host, port } => write!(f, "the headless name {host}:{port}"),
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

/// Returns the address that peers reach this replica at, if none is configured: the bound
/// one if it is a particular one, else the local address of a socket connected to the first
/// seed. Nothing is sent.
///
/// # Errors
/// If the first seed cannot be resolved or no route leads there.
pub(crate) async fn advertised<N: Net>(net: &N, seeds: &Seeds, bound: SocketAddr) -> io::Result<SocketAddr> {
    if !bound.ip().is_unspecified() {
        return Ok(canonical(bound));
    }
    let first = match seeds {
        Seeds::Alone => {
            let loopback: IpAddr = [127, 0, 0, 1].into();
            return Ok(SocketAddr::new(loopback, bound.port()));
        }
        Seeds::Static(addrs) => addrs.first().copied(),
        Seeds::Name { host, port } => {
            let ips = net.lookup(host).await?;
            ips.first().map(|ip| SocketAddr::new(ip.to_canonical(), *port))
        }
    };
    let first = first.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))?;
    let ip = net.local_ip_towards(first).await?;
    Ok(SocketAddr::new(ip.to_canonical(), bound.port()))
}

/// Asks the directory again and again.
pub(crate) struct Discovery<N> {
    net: Arc<N>,
    seeds: Seeds,
    /// When to ask next; `None` if there is nothing more to ask.
    due: Option<Instant>,
    asking: Option<Question>,
}

/// A question to the resolver under way.
type Question = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

impl<N: Net> Discovery<N> {
    /// Returns a discovery whose first answer is due at once.
    pub(crate) fn new(net: Arc<N>, seeds: Seeds) -> Self {
        let due = (seeds != Seeds::Alone).then(Instant::now);
        Self { net, seeds, due, asking: None }
    }

    /// Waits for the next answer: all addresses, in order, without repetition.
    ///
    /// # Errors
    /// If a name could not be resolved in time; the next call asks again.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, the question stays asked.
    pub(crate) async fn next(&mut self) -> io::Result<Vec<SocketAddr>> {
        let Some(due) = self.due else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(due).await;
        let (host, port) = match &self.seeds {
            Seeds::Name { host, port } => (host.clone(), *port),
            // Complete by construction, and it never changes: once is enough.
            Seeds::Static(addrs) => {
                self.due = None;
                return Ok(addrs.clone());
            }
            Seeds::Alone => return std::future::pending().await,
        };
        let net = &self.net;
        let asking = self.asking.get_or_insert_with(|| {
            let net = Arc::clone(net);
            Box::pin(async move {
                let answer = tokio::time::timeout(LOOKUP_TIMEOUT, net.lookup(&host)).await;
                answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            })
        });
        let answer = asking.as_mut().await;
        self.asking = None;
        self.due = Some(Instant::now() + LOOKUP_EVERY_JOINING);
        let mut addrs: Vec<_> = answer?.into_iter().map(|ip| SocketAddr::new(ip.to_canonical(), port)).collect();
        addrs.sort_unstable();
        addrs.dedup();
        addrs.truncate(MAX_LISTED);
        Ok(addrs)
    }

    /// Slows down: every listed address has answered.
    pub(crate) fn settled(&mut self) {
        if matches!(self.seeds, Seeds::Name { .. }) && self.asking.is_none() {
            self.due = Some(Instant::now() + LOOKUP_EVERY);
        }
    }
}

impl<N> fmt::Debug for Discovery<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discovery").field("seeds", &self.seeds).field("due", &self.due).finish_non_exhaustive()
    }
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
