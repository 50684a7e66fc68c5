//! Connections: accepted, encrypted if so asked, bounded, and let go of in good order. Knows nothing of what is served.

use super::stalled::Watched;
use crate::config::serve::ServeLimits;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

/// Pause after a failed accept: the system is out of something, and may have it again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// See the module.
pub(super) struct Server {
    router: Router,
    header_timeout: Duration,
    write_timeout: Duration,
    tls: Option<TlsAcceptor>,
    places: Arc<Semaphore>,
    n_open: Arc<AtomicUsize>,
    connections: GracefulShutdown,
}

impl Server {
    /// `n_open` is kept at the number of connections that are open.
    pub(super) fn new(router: Router, limits: &ServeLimits, tls: Option<TlsAcceptor>, n_open: Arc<AtomicUsize>) -> Self {
        let places = Arc::new(Semaphore::new(limits.max_connections));
        let (header_timeout, write_timeout) = (limits.header_timeout, limits.write_timeout);
        Self { router, header_timeout, write_timeout, tls, places, n_open, connections: GracefulShutdown::new() }
    }

    /// Accepts connections for ever: the places for them are never closed.
    pub(super) async fn accept(&self, listener: TcpListener) {
        while let Ok(place) = Arc::clone(&self.places).acquire_owned().await {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            // Deltas are small, and wanted at once. A socket that refuses works all the same.
            drop(stream.set_nodelay(true));
            let connection = Connection {
                service: TowerToHyperService::new(self.router.clone()),
                header_timeout: self.header_timeout,
                watcher: self.connections.watcher(),
                _place: Place::new(place, &self.n_open),
            };
            let stream = Watched::new(stream, self.write_timeout);
            match self.tls.clone() {
                None => drop(tokio::spawn(connection.serve(stream))),
                Some(tls) => drop(tokio::spawn(async move {
                    // One that does not shake hands is no client.
                    if let Ok(Ok(stream)) = tokio::time::timeout(connection.header_timeout, tls.accept(stream)).await {
                        connection.serve(stream).await;
                    }
                })),
            }
        }
    }

    /// The connections that are open.
    pub(super) fn into_connections(self) -> GracefulShutdown {
        self.connections
    }
}

/// One connection.
struct Connection {
    service: TowerToHyperService<Router>,
    header_timeout: Duration,
    watcher: Watcher,
    _place: Place,
}

impl Connection {
    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(self.header_timeout);
        // A client that breaks off is its own affair.
        drop(self.watcher.watch(builder.serve_connection(TokioIo::new(stream), self.service)).await);
    }
}

/// A connection's place, counted as long as it is held.
struct Place {
    _permit: OwnedSemaphorePermit,
    n_open: Arc<AtomicUsize>,
}

impl Place {
    fn new(permit: OwnedSemaphorePermit, n_open: &Arc<AtomicUsize>) -> Self {
        n_open.fetch_add(1, Relaxed);
        Self { _permit: permit, n_open: Arc::clone(n_open) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.n_open.fetch_sub(1, Relaxed);
    }
}
