//! TLS, on the proxy port and to upstreams.
//!
//! Knows rustls, with ring. Must not know what is spoken inside, or where certificates
//! stand. The invariant it keeps: a new certificate is for the next connection; those
//! that are served go on.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, Waker};

use rustls::pki_types::CertificateDer;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, Error, RootCertStore, ServerConfig};
use tokio::io::ReadBuf;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::listen::{Stream, say_at_once};

/// The first byte of every TLS connection: a record of the handshake (RFC 8446, 5.1).
const HANDSHAKE: u8 = 0x16;

/// What a caller reads that speaks plain HTTP where TLS is spoken.
const NOT_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 42\r\n\
connection: close\r\n\r\nThis port speaks TLS: use https, not http\n";

/// The certificate that callers are shown.
pub(crate) struct Tls(RwLock<Arc<ServerConfig>>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// # Errors
    /// If rustls cannot offer its default protocol versions with ring.
    pub(crate) fn new(certified: Arc<CertifiedKey>) -> Result<Self, Error> {
        Ok(Self(RwLock::new(server(certified)?)))
    }

    /// Shows this certificate to whoever connects from now on.
    ///
    /// # Errors
    /// As [`Tls::new`]; the old one stays.
    pub(crate) fn replace(&self, certified: Arc<CertifiedKey>) -> Result<(), Error> {
        let config = server(certified)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// Returns the connection once both sides agree.
    ///
    /// # Errors
    /// If the caller hung up, or does not speak TLS as we do.
    pub(super) async fn accept<I: Stream>(&self, mut io: I) -> io::Result<TlsStream<I>> {
        if io.first().await?.is_some_and(|first| first != HANDSHAKE) {
            say_at_once(&mut io, NOT_TLS);
            // What is left unread would turn the answer into a reset.
            discard_at_once(&mut io);
            return Err(io::Error::other("the caller speaks something else"));
        }
        let config = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        TlsAcceptor::from(config).accept(io).await
    }
}

/// Reads what can be read without waiting.
fn discard_at_once(io: &mut impl Stream) {
    let mut bytes = [0; 4_096];
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        let mut read = ReadBuf::new(&mut bytes);
        match Pin::new(&mut *io).poll_read(&mut cx, &mut read) {
            Poll::Ready(Ok(())) if !read.filled().is_empty() => {}
            _ => return,
        }
    }
}

fn server(certified: Arc<CertifiedKey>) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let resolver = Arc::new(SingleCertAndKey::from(certified));
    let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Returns how upstreams are believed: by the public authorities, and by these.
///
/// # Errors
/// If rustls cannot offer its default protocol versions with ring, or one of these cannot
/// be an authority.
pub(super) fn client(authorities: &[CertificateDer<'static>]) -> Result<ClientConfig, Error> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    for authority in authorities {
        roots.add(authority.clone())?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}
