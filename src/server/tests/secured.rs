//! TLS and HTTP/2, to the proxy and to upstreams, and files that are read again.

use super::*;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use axum::extract::Request as Sent;
use axum::middleware::{Next, from_fn};
use http_body::Frame;
use http_body_util::{Full, StreamBody};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::super::listen::{self, Door};
use super::super::reread::Files;
use super::super::tls::{self, Tls};
use crate::config::{Config, ConfigError};

/// A folder of this test's own, gone when it ends.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("quotum-secured-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Writes files into a folder and lets `name` lead there, as Kubernetes swaps secrets.
    fn swap(&self, folder: &str, files: &[(&str, &str)]) {
        let folder = self.0.join(folder);
        fs::create_dir(&folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
        let link = self.0.join("next");
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        fs::rename(link, self.0.join("now")).unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.0.join("now").join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A certificate for `localhost` and its key, in PEM, and the certificate's bytes.
fn made() -> (String, String, CertificateDer<'static>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem(), made.cert.der().clone())
}

fn config(proxy: &str) -> Result<Config, ConfigError> {
    let limits = "limits: [{ unit: tokens, amount: 1000, window: 60s }]";
    let deployments = format!("deployments: [{{ id: a, model: m, upstream: 'http://127.0.0.1:1/v1', {limits} }}]");
    parse(&format!("proxy: {{ {proxy} }}\n{deployments}"), "test.yaml", &|_| None, &Flags::default())
}

/// A port with TLS, and its certificate.
struct Port {
    at: SocketAddr,
    certificate: CertificateDer<'static>,
    files: Arc<Files>,
    stop: watch::Sender<bool>,
    serving: JoinHandle<std::io::Result<()>>,
    folder: Folder,
}

impl Port {
    async fn new(router: Router) -> Self {
        let folder = Folder::new();
        let (chain, key, certificate) = made();
        folder.swap("first", &[("chain", &chain), ("key", &key)]);
        let text = format!("tls: {{ certificate: '{}', key: '{}' }}", folder.path("chain"), folder.path("key"));
        let config = config(&text).unwrap();
        let tls = Arc::new(Tls::new(config.proxy.tls.clone().unwrap().certified).unwrap());
        let files = Files::new(&config, None, &Arc::new(Credentials::new(&[])), Some(&tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let telemetry = Arc::new(Telemetry::new());
        let door = Door { tls: Some(tls), bounds: config.proxy.bounds, telemetry };
        let serving = tokio::spawn(listen::serve(listener, router, door, stopped));
        Self { at, certificate, files, stop, serving, folder }
    }

    /// Connects as somebody who believes this certificate alone.
    async fn connect(
        &self,
        certificate: &CertificateDer<'static>,
        protocol: &str,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut config = tls::client(std::slice::from_ref(certificate)).unwrap();
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        let io = TcpStream::connect(self.at).await.unwrap();
        TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost").unwrap(), io).await
    }
}

async fn speak_http2<I>(io: I) -> http2::SendRequest<Full<Bytes>>
where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (send, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    send
}

fn asked(body: &Value, headers: &[(&str, &str)]) -> Request<Full<Bytes>> {
    let mut request = Request::post("https://localhost/v1/chat/completions");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::new(Bytes::from(body.to_string()))).unwrap()
}

async fn whole(response: Response<hyper::body::Incoming>) -> (StatusCode, String) {
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn both_versions_of_http_are_spoken_over_tls() {
    let bench = Bench::new().await;
    let port = Port::new(bench.router.clone()).await;
    let ten = [("x-stub-completion-tokens", "10")];
    let io = port.connect(&port.certificate, "h2").await.unwrap();
    assert_eq!(io.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let send = speak_http2(io).await;
    let both = [hello(), streaming()].map(|body| {
        let mut send = send.clone();
        async move { whole(send.send_request(asked(&body, &ten)).await.unwrap()).await }
    });
    let [first, second] = both;
    // At once, over one connection.
    let ((status, text), (streamed, events)) = tokio::join!(first, second);
    assert_eq!((status, streamed), (StatusCode::OK, StatusCode::OK));
    assert!(text.contains("\"usage\"") && events.ends_with("data: [DONE]\n\n"), "{text} {events}");

    let io = port.connect(&port.certificate, "http/1.1").await.unwrap();
    assert_eq!(io.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let (mut send, connection) = http1::handshake(TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    let (status, events) = whole(send.send_request(asked(&streaming(), &ten)).await.unwrap()).await;
    assert!(status == StatusCode::OK && events.ends_with("data: [DONE]\n\n"), "{events}");
    assert_eq!((bench.tokens(), bench.requests()), (60, 3));
}

#[tokio::test]
async fn plain_http_at_a_port_with_tls_is_told_so() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let port = Port::new(Router::new()).await;
    let mut io = TcpStream::connect(port.at).await.unwrap();
    io.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut told = String::new();
    io.read_to_string(&mut told).await.unwrap();
    assert!(told.starts_with("HTTP/1.1 400") && told.ends_with("use https, not http\n"), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_does_not_end_is_let_go() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let port = Port::new(Router::new()).await;
    for said in [&[][..], &[0x16, 3, 1]] {
        let mut io = TcpStream::connect(port.at).await.unwrap();
        io.write_all(said).await.unwrap();
        let _ = io.read_to_end(&mut Vec::new()).await;
    }
}

#[tokio::test]
async fn http2_is_spoken_in_plain_to_whoever_begins_so() {
    let bench = Bench::new().await;
    let (io, _stop) = bench.connect(1 << 16);
    let (mut send, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    // Trailers are nobody's headers.
    let mut trailers = HeaderMap::new();
    trailers.insert("x-stub-fault", "500".parse().unwrap());
    let frames = [Frame::data(Bytes::from(streaming().to_string())), Frame::trailers(trailers)];
    let body = StreamBody::new(tokio_stream::iter(frames.map(Ok::<_, std::convert::Infallible>)));
    let request = Request::post("http://x/v1/chat/completions").header("x-stub-completion-tokens", "10");
    let (status, events) = whole(send.send_request(request.body(body).unwrap()).await.unwrap()).await;
    assert!(status == StatusCode::OK && events.ends_with("data: [DONE]\n\n"), "{events}");
    assert_eq!((bench.tokens(), bench.requests()), (20, 1));
}

#[tokio::test]
async fn a_stream_that_its_caller_resets_is_settled_as_a_hang_up() {
    let bench = Bench::new().await;
    let (io, _stop) = bench.connect(1 << 16);
    let mut send = speak_http2(io).await;
    let slow = [("x-stub-completion-tokens", "30"), ("x-stub-body-ms", "600000")];
    let mut answer = send.send_request(asked(&streaming(), &slow)).await.unwrap();
    answer.body_mut().frame().await.unwrap().unwrap();
    assert_eq!(bench.tokens(), PROMPT + 100);
    drop(answer);
    while bench.tokens() == PROMPT + 100 {
        tokio::task::yield_now().await;
    }
    assert!((PROMPT..PROMPT + 30).contains(&bench.tokens()), "{}", bench.tokens());
    // The connection goes on.
    assert_eq!(whole(send.send_request(asked(&hello(), &[])).await.unwrap()).await.0, StatusCode::OK);
}

#[tokio::test]
async fn too_many_headers_are_told_so_on_http2() {
    let bench = Bench::with(Extra { proxy: "max_headers: 20", ..Extra::default() }).await;
    let (io, _stop) = bench.connect(1 << 16);
    let mut send = speak_http2(io).await;
    let names: Vec<String> = (0..21).map(|i| format!("x-{i}")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "1")).collect();
    let (status, text) = whole(send.send_request(asked(&hello(), &many)).await.unwrap()).await;
    assert!(status == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE && text.contains("headers_too_large"), "{text}");
}

#[tokio::test]
async fn who_is_refused_on_http2_while_it_sends_is_heard_out() {
    let bench = Bench::with(Extra { proxy: "max_body: 1MiB", ..Extra::default() }).await;
    let large = Bytes::from(vec![b' '; 1_500_000]);
    let sent = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let pieces = large.chunks(1 << 14).map(Bytes::copy_from_slice).collect::<Vec<_>>();
    let (count, all) = (sent.clone(), pieces.len() as u32);
    let pieces = pieces.into_iter().map(move |piece| {
        count.fetch_add(1, Ordering::Relaxed);
        Ok::<_, std::convert::Infallible>(Frame::data(piece))
    });
    let (io, _stop) = bench.connect(1 << 16);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    let body = StreamBody::new(tokio_stream::iter(pieces));
    let request = Request::post("http://x/v1/chat/completions").body(body).unwrap();
    let (status, text) = whole(sender.send_request(request).await.unwrap()).await;
    assert!(status == StatusCode::PAYLOAD_TOO_LARGE && text.contains("request_too_large"), "{text}");
    assert_eq!(sent.load(Ordering::Relaxed), all, "it was cut off while it sent");
}

#[tokio::test]
async fn a_new_certificate_is_for_new_connections_and_a_broken_one_for_none() {
    let bench = Bench::new().await;
    let port = Port::new(bench.router.clone()).await;
    let mut old = speak_http2(port.connect(&port.certificate, "h2").await.unwrap()).await;
    let (chain, key, certificate) = made();
    port.folder.swap("second", &[("chain", &chain), ("key", &key)]);
    assert!(port.connect(&certificate, "h2").await.is_err(), "nobody has looked yet");
    port.files.look();
    assert!(port.connect(&certificate, "h2").await.is_ok());
    assert!(port.connect(&port.certificate, "h2").await.is_err());
    assert_eq!(old.send_request(asked(&hello(), &[])).await.unwrap().status(), StatusCode::OK);
    let (other, _, _) = made();
    for (i, files) in [
        &[("chain", other.as_str()), ("key", &key)][..],
        &[("chain", ""), ("key", &key)],
        &[("chain", &chain), ("key", "-----BEGIN PRIVATE KEY-----\n")],
        &[("chain", &chain)],
    ]
    .iter()
    .enumerate()
    {
        port.folder.swap(&format!("broken-{i}"), files);
        port.files.look();
        assert!(port.connect(&certificate, "h2").await.is_ok(), "{i}");
    }
}

#[tokio::test]
async fn new_credentials_count_at_once_and_an_emptied_file_opens_nothing() {
    let folder = Folder::new();
    folder.swap("0", &[("credentials", "one\n# two\n")]);
    let path = folder.path("credentials");
    let mut config = config(&format!("credentials_file: '{path}'")).unwrap();
    // A master key of LiteLLM's stands in no file that is read again.
    config.proxy.fixed_credentials = vec![crate::config::Secret::new("fixed")];
    let credentials = Arc::new(Credentials::new(&config.proxy.credentials));
    let files = Files::new(&config, None, &credentials, None);
    let accepts = |credential: &str| {
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", credential.parse().unwrap());
        credentials.accept(&headers)
    };
    assert!(accepts("one") && !accepts("two"));
    folder.swap("1", &[("credentials", "two\n")]);
    files.look();
    assert!(accepts("two") && !accepts("one"));
    for (i, broken) in [&[("credentials", "")][..], &[("credentials", "\n# none\n")], &[]].iter().enumerate() {
        folder.swap(&format!("broken-{i}"), broken);
        files.look();
        assert!(accepts("two") && !credentials.is_empty(), "{broken:?}");
    }
    folder.swap("2", &[("credentials", "three\r\n")]);
    files.look();
    assert!(accepts("three") && !accepts("two") && accepts("fixed"));
}

#[tokio::test]
async fn a_port_with_tls_drains_what_is_in_flight() {
    for protocol in ["h2", "http/1.1"] {
        let bench = Bench::new().await;
        let port = Port::new(bench.router.clone()).await;
        let io = port.connect(&port.certificate, protocol).await.unwrap();
        // A connection in its handshake must not hold the pod up.
        let _silent = TcpStream::connect(port.at).await.unwrap();
        let slow = [("x-stub-completion-tokens", "10"), ("x-stub-body-ms", "300")];
        let request = asked(&streaming(), &slow);
        let mut answer = if protocol == "h2" {
            speak_http2(io).await.send_request(request).await.unwrap()
        } else {
            let (mut send, connection) = http1::handshake(TokioIo::new(io)).await.unwrap();
            tokio::spawn(connection);
            send.send_request(request).await.unwrap()
        };
        answer.body_mut().frame().await.unwrap().unwrap();
        port.stop.send_replace(true);
        let (_, events) = whole(answer).await;
        assert!(events.ends_with("data: [DONE]\n\n"), "{protocol}: {events}");
        port.serving.await.unwrap().unwrap();
        assert_eq!(bench.tokens(), 20);
    }
}

#[tokio::test]
async fn an_upstream_with_an_authority_of_its_own_is_spoken_to_in_http2() {
    async fn versioned(request: Sent, next: Next) -> Response<Body> {
        let version = format!("{:?}", request.version());
        let mut response = next.run(request).await;
        response.headers_mut().insert("x-version", version.parse().unwrap());
        response
    }
    let stub = Stub::new(Behaviour { bytes_per_token: 1, ..Behaviour::default() });
    let port = Port::new(stub.router().layer(from_fn(versioned))).await;
    let upstream = format!("https://localhost:{}/v1", port.at.port());
    let strange = Bench::with(Extra { upstream: Some(&upstream), ..Extra::default() }).await;
    let answer = strange.chat(hello(), &[]).await;
    assert_eq!((answer.status, &answer.error()["code"]), (StatusCode::BAD_GATEWAY, &json!("upstream_unreachable")));
    assert_eq!((strange.tokens(), strange.requests()), (0, 0));

    let proxy = format!("upstream_ca: '{}'", port.folder.path("chain"));
    let bench = Bench::with(Extra { upstream: Some(&upstream), proxy: &proxy, ..Extra::default() }).await;
    let ten = [("x-stub-completion-tokens", "10")];
    for body in [hello(), streaming()] {
        let answer = bench.chat(body, &ten).await;
        assert_eq!((answer.status, answer.header("x-version")), (StatusCode::OK, Some("HTTP/2.0")), "{}", answer.text);
    }
    assert_eq!((bench.tokens(), bench.requests()), (40, 2));
    let cut = bench.chat(streaming(), &[("x-stub-fault", "cut"), ("x-stub-body-ms", "100")]).await;
    assert!(cut.broke_off && cut.text.contains(r#""code":"upstream_cut""#), "{}", cut.text);
    assert!((40 + PROMPT..40 + PROMPT + 100).contains(&bench.tokens()), "{}", bench.tokens());
}

#[test]
fn a_wrong_certificate_key_or_authority_is_named() {
    let folder = Folder::new();
    let (chain, key, _) = made();
    let (_, other, _) = made();
    folder.swap("0", &[("chain", &chain), ("key", &key), ("other", &other), ("empty", "")]);
    let path = |name: &str| folder.path(name);
    let tls =
        |chain: &str, key: &str| config(&format!("tls: {{ certificate: '{}', key: '{}' }}", path(chain), path(key)));
    assert!(tls("chain", "key").is_ok());
    for (wrong, code, told) in [
        (tls("chain", "other"), 64, "other is not the key of the first certificate in "),
        (tls("key", "key"), 64, "key holds no certificate in PEM"),
        (tls("chain", "chain"), 64, "chain holds no private key in PEM"),
        (tls("empty", "key"), 64, "empty holds no certificate"),
        (tls("absent", "key"), 69, "absent cannot be read"),
        (tls("chain", "absent"), 69, "absent cannot be read"),
        (config(&format!("tls: {{ key: '{}' }}", path("key"))), 64, "proxy.tls: needs both files"),
        (config("tls: {}"), 64, "proxy.tls: needs both files"),
        (config(&format!("upstream_ca: '{}'", path("key"))), 64, "proxy.upstream_ca: "),
        (config(&format!("upstream_ca: '{}'", path("absent"))), 69, "proxy.upstream_ca: "),
        (config("max_connections: 0"), 64, "proxy.max_connections: 0 is out of range"),
        (config("max_body: 2MiB, max_bodies: 1MiB"), 64, "proxy.max_bodies: `1MiB` is less than the 2097152 bytes"),
        (config("max_streams: -1"), 64, "proxy.max_streams: -1 is out of range"),
        (config("max_headers: 5000"), 64, "proxy.max_headers: 5000 is out of range"),
        (config("max_header_bytes: 1KiB"), 64, "proxy.max_header_bytes: `1KiB` is out of range"),
        (config("timeouts: { idle: 0s }"), 64, "proxy.timeouts.idle: `0s` is out of range"),
    ] {
        let wrong = wrong.unwrap_err();
        assert_eq!(wrong.exit_code(), code, "{wrong}");
        assert!(wrong.to_string().contains(told) && wrong.to_string().starts_with("test.yaml:1:"), "{told}: {wrong}");
    }
    assert!(!Path::new(&path("absent")).exists());
}
