//! Connections: accepted, encrypted if so asked, bounded, and let go of in good order. Knows nothing of what is served.

use super::stalled::Watched;
use crate::config::serve::ServeLimits;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;

/// Pause after a failed accept: the system is out of something, and may have it again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// See the module.
pub(super) struct Server {
    served: Mutex<Served>,
    header_timeout: Duration,
    write_timeout: Duration,
    tls: Option<TlsAcceptor>,
    places: Arc<Semaphore>,
    n_open: Arc<AtomicUsize>,
    /// True when connections are to be cut off.
    cut: watch::Sender<bool>,
}

/// What connections that come are given.
struct Served {
    router: Router,
    /// Of those that may finish when the server ends; gone then.
    connections: Option<GracefulShutdown>,
}

impl Server {
    /// `n_open` is kept at the number of connections that are open. `router` is what they get at first.
    pub(super) fn new(router: Router, limits: &ServeLimits, tls: Option<TlsAcceptor>, n_open: Arc<AtomicUsize>) -> Self {
        let places = Arc::new(Semaphore::new(limits.max_connections));
        let (header_timeout, write_timeout) = (limits.header_timeout, limits.write_timeout);
        let served = Mutex::new(Served { router, connections: Some(GracefulShutdown::new()) });
        Self { served, header_timeout, write_timeout, tls, places, n_open, cut: watch::Sender::new(false) }
    }

    fn served(&self) -> std::sync::MutexGuard<'_, Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections that come from now on get that.
    pub(super) fn serve(&self, router: Router) {
        self.served().router = router;
    }

    /// Connections that come from now on get that; the others, which are given, may finish. `None` if that was asked for before.
    pub(super) fn drain(&self, router: Router) -> Option<GracefulShutdown> {
        let mut served = self.served();
        served.router = router;
        served.connections.take()
    }

    /// Cuts all connections off.
    pub(super) fn cut(&self) {
        self.cut.send_replace(true);
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
            let (router, watcher) = {
                let served = self.served();
                (served.router.clone(), served.connections.as_ref().map(GracefulShutdown::watcher))
            };
            let connection = Connection {
                service: TowerToHyperService::new(router),
                header_timeout: self.header_timeout,
                watcher,
                cut: self.cut.subscribe(),
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
}

/// One connection.
struct Connection {
    service: TowerToHyperService<Router>,
    header_timeout: Duration,
    watcher: Option<Watcher>,
    cut: watch::Receiver<bool>,
    _place: Place,
}

impl Connection {
    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let Self { service, header_timeout, watcher, mut cut, _place } = self;
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(header_timeout);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        let served = async {
            // A client that breaks off is its own affair.
            match watcher {
                Some(watcher) => drop(watcher.watch(connection).await),
                None => drop(connection.await),
            }
        };
        tokio::select! {
            () = served => {}
            // An error means that the server is gone: cut off, too.
            _ = cut.wait_for(|is_cut| *is_cut) => {}
        }
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
