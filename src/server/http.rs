//! Connections: accepted, bounded, and let go of in good order. Knows nothing of what is served.

use crate::config::serve::ServeLimits;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Pause after a failed accept: the system is out of something, and may have it again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// See the module.
pub(super) struct Server {
    router: Router,
    header_timeout: Duration,
    places: Arc<Semaphore>,
    connections: GracefulShutdown,
}

impl Server {
    pub(super) fn new(router: Router, limits: &ServeLimits) -> Self {
        let places = Arc::new(Semaphore::new(limits.max_connections));
        Self { router, header_timeout: limits.header_timeout, places, connections: GracefulShutdown::new() }
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
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(self.header_timeout);
            let service = TowerToHyperService::new(self.router.clone());
            let connection = self.connections.watch(builder.serve_connection(TokioIo::new(stream), service));
            tokio::spawn(async move {
                // A client that breaks off is its own affair.
                drop(connection.await);
                drop(place);
            });
        }
    }

    /// The connections that are open.
    pub(super) fn into_connections(self) -> GracefulShutdown {
        self.connections
    }
}
