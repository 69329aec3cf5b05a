//! The network that the cluster loop sees: one UDP socket, and names.
//!
//! Knows addresses and errors of the operating system. Must not know what a datagram
//! holds. The invariant it keeps: addresses are IPv4 wherever they can be, on both sides of
//! this file, whatever family the socket is of; and the port is bound by nobody else, which
//! is what proves that an earlier process at it is dead.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::UdpSocket;

/// A network: the machine's own ([`UdpNet`]) or a simulated one.
pub trait Net: Send + Sync + 'static {
    /// A bound socket.
    type Socket: Datagrams;

    /// Returns a socket bound to this address and to nobody else's use; port 0 is any free
    /// one.
    fn bind(&self, addr: SocketAddr) -> impl Future<Output = io::Result<Self::Socket>> + Send;

    /// Returns all addresses of a name.
    fn lookup(&self, host: &str) -> impl Future<Output = io::Result<Vec<IpAddr>>> + Send;

    /// Returns the address from which this machine reaches `peer`. Nothing is sent.
    fn local_ip_towards(&self, peer: SocketAddr) -> impl Future<Output = io::Result<IpAddr>> + Send;
}

/// A socket that carries datagrams.
pub trait Datagrams: Send + Sync + 'static {
    /// Returns the address it is bound to.
    ///
    /// # Errors
    /// If the operating system does not say.
    fn local_addr(&self) -> io::Result<SocketAddr>;

    /// Sends a datagram, or loses it.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, nothing was sent.
    fn send_to(&self, datagram: &[u8], to: SocketAddr) -> impl Future<Output = io::Result<()>> + Send;

    /// Waits for a datagram; returns its length and where it came from.
    ///
    /// # Cancel safety
    /// Dropped before it is ready, nothing was taken.
    fn recv_from(&self, buffer: &mut [u8]) -> impl Future<Output = io::Result<(usize, SocketAddr)>> + Send;

    /// Takes a datagram that has already arrived.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none.
    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)>;
}

/// The machine's network: tokio's UDP and the system's resolver.
#[derive(Clone, Copy, Debug, Default)]
pub struct UdpNet;

impl Net for UdpNet {
    type Socket = UdpDatagrams;

    /// Binds exclusively: no address reuse is asked for, so a second process fails with
    /// [`io::ErrorKind::AddrInUse`]. `[::]` takes IPv4 too; where the machine has no IPv6,
    /// `0.0.0.0` is bound in its place.
    async fn bind(&self, addr: SocketAddr) -> io::Result<UdpDatagrams> {
        let socket = match UdpSocket::bind(addr).await {
            Err(error) if addr.ip() == Ipv6Addr::UNSPECIFIED && error.kind() != io::ErrorKind::AddrInUse => {
                UdpSocket::bind((Ipv4Addr::UNSPECIFIED, addr.port())).await?
            }
            bound => bound?,
        };
        let ipv6 = socket.local_addr()?.is_ipv6();
        Ok(UdpDatagrams { socket, ipv6 })
    }

    async fn lookup(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        // The resolver wants a port and gives it back.
        let found = tokio::net::lookup_host((host, 0)).await?;
        Ok(found.map(|addr| addr.ip().to_canonical()).collect())
    }

    async fn local_ip_towards(&self, peer: SocketAddr) -> io::Result<IpAddr> {
        let any: IpAddr = match peer.ip().to_canonical() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let probe = UdpSocket::bind((any, 0)).await?;
        probe.connect(canonical(peer)).await?;
        Ok(probe.local_addr()?.ip().to_canonical())
    }
}

/// A socket of [`UdpNet`].
#[derive(Debug)]
pub struct UdpDatagrams {
    socket: UdpSocket,
    ipv6: bool,
}

impl UdpDatagrams {
    /// Takes over a socket that is bound already, for callers that must know the port first.
    ///
    /// # Errors
    /// If the socket cannot be used without blocking, or does not know its address.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn from_std(socket: std::net::UdpSocket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let ipv6 = socket.local_addr()?.is_ipv6();
        Ok(Self { socket: UdpSocket::from_std(socket)?, ipv6 })
    }

    /// An IPv6 socket speaks to IPv4 under mapped addresses only.
    fn reachable(&self, to: SocketAddr) -> SocketAddr {
        match (self.ipv6, to) {
            (true, SocketAddr::V4(v4)) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            (_, to) => to,
        }
    }
}

impl Datagrams for UdpDatagrams {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    async fn send_to(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.socket.send_to(datagram, self.reachable(to)).await.map(drop)
    }

    async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (length, from) = self.socket.recv_from(buffer).await?;
        Ok((length, canonical(from)))
    }

    fn try_recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (length, from) = self.socket.try_recv_from(buffer)?;
        Ok((length, canonical(from)))
    }
}

/// Returns the address with an IPv4 address mapped into IPv6 taken out again.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dual_stack_socket_speaks_ipv4_in_both_directions() {
        let dual = UdpNet.bind((Ipv6Addr::UNSPECIFIED, 0).into()).await.unwrap();
        let plain = UdpNet.bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let (port, home) = (dual.local_addr().unwrap().port(), plain.local_addr().unwrap());
        let mut buffer = [0; 8];
        plain.send_to(b"ping", (Ipv4Addr::LOCALHOST, port).into()).await.unwrap();
        assert_eq!(dual.recv_from(&mut buffer).await.unwrap(), (4, home));
        dual.send_to(b"pong", home).await.unwrap();
        let from = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        assert_eq!(plain.recv_from(&mut buffer).await.unwrap(), (4, from));
        let empty = plain.try_recv_from(&mut buffer).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
    }

    #[tokio::test]
    async fn a_bound_port_is_nobody_elses() {
        let first = UdpNet.bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let again = UdpNet.bind(first.local_addr().unwrap()).await.unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
        // Nor is it taken by falling back from IPv6.
        let dual = UdpNet.bind((Ipv6Addr::UNSPECIFIED, 0).into()).await.unwrap();
        let port = dual.local_addr().unwrap().port();
        let again = UdpNet.bind((Ipv6Addr::UNSPECIFIED, port).into()).await.unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn the_local_address_towards_loopback_is_loopback() {
        let ip = UdpNet.local_ip_towards((Ipv4Addr::LOCALHOST, 9).into()).await.unwrap();
        assert_eq!(ip, IpAddr::from(Ipv4Addr::LOCALHOST));
    }
}
