//! A store whose process dies at its n-th write. After that nothing works any more, and nothing is cleaned up.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt as _,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};

/// What the n-th write still does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Death {
    /// Nothing.
    Before,
    /// All, but nobody hears of it.
    After,
    /// Half of a part of an upload; otherwise nothing.
    HalfPart,
    /// Half of a put, under its name: stores that are not atomic.
    Torn,
}

impl Death {
    pub(crate) const ALL: [Self; 4] = [Self::Before, Self::After, Self::HalfPart, Self::Torn];
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct DyingStore {
    inner: Arc<dyn ObjectStore>,
    life: Arc<Life>,
}

#[derive(Debug)]
struct Life {
    n_writes: AtomicUsize,
    dies_at: usize, // from 1
    death: Death,
}

/// Whether a write is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Do,
    Die,
    Refuse,
}

impl DyingStore {
    /// Dies at its `dies_at`-th write, counted from 1.
    pub(crate) fn new(inner: Arc<dyn ObjectStore>, dies_at: usize, death: Death) -> Self {
        Self { inner, life: Arc::new(Life { n_writes: AtomicUsize::new(0), dies_at, death }) }
    }

    /// Never dies, only counts.
    pub(crate) fn immortal(inner: Arc<dyn ObjectStore>) -> Self {
        Self::new(inner, usize::MAX, Death::Before)
    }

    /// Writes tried so far.
    pub(crate) fn n_writes(&self) -> usize {
        self.life.n_writes.load(Ordering::SeqCst)
    }
}

impl Life {
    fn write(&self) -> Verdict {
        let number = self.n_writes.fetch_add(1, Ordering::SeqCst) + 1;
        match number.cmp(&self.dies_at) {
            std::cmp::Ordering::Less => Verdict::Do,
            std::cmp::Ordering::Equal => Verdict::Die,
            std::cmp::Ordering::Greater => Verdict::Refuse,
        }
    }

    fn read(&self) -> Result<()> {
        if self.n_writes.load(Ordering::SeqCst) < self.dies_at { Ok(()) } else { Err(dead()) }
    }

    /// Counts a write that is done wholly or not at all.
    async fn whole<T>(&self, write: impl Future<Output = Result<T>>) -> Result<T> {
        match self.write() {
            Verdict::Do => write.await,
            Verdict::Die if self.death == Death::After => write.await.and(Err(dead())),
            Verdict::Die | Verdict::Refuse => Err(dead()),
        }
    }
}

fn dead() -> Error {
    Error::Generic { store: "DyingStore", source: "the process is dead".into() }
}

fn half(payload: &PutPayload) -> PutPayload {
    let bytes: Vec<u8> = payload.iter().flat_map(|chunk| chunk.iter().copied()).collect();
    PutPayload::from(bytes[..bytes.len() / 2].to_vec())
}

impl fmt::Display for DyingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DyingStore({})", self.inner)
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

impl ObjectStore for DyingStore {
    fn put_opts<'a, 'b, 'c>(&'a self, at: &'b Path, payload: PutPayload, options: PutOptions) -> Answer<'c, PutResult>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        async move {
            let torn = self.life.death == Death::Torn && self.n_writes() + 1 == self.life.dies_at;
            if torn {
                self.inner.put_opts(at, half(&payload), options.clone()).await?;
            }
            self.life.whole(self.inner.put_opts(at, payload, options)).await
        }
        .boxed()
    }

    fn put_multipart_opts<'a, 'b, 'c>(
        &'a self,
        at: &'b Path,
        options: PutMultipartOptions,
    ) -> Answer<'c, Box<dyn MultipartUpload>>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        async move {
            let inner = self.life.whole(self.inner.put_multipart_opts(at, options)).await?;
            let upload: Box<dyn MultipartUpload> = Box::new(DyingUpload { inner: Some(inner), life: self.life.clone() });
            Ok(upload)
        }
        .boxed()
    }

    fn get_opts<'a, 'b, 'c>(&'a self, at: &'b Path, options: GetOptions) -> Answer<'c, GetResult>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        async move {
            self.life.read()?;
            self.inner.get_opts(at, options).await
        }
        .boxed()
    }

    fn delete_stream(&self, places: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, life) = (self.inner.clone(), self.life.clone());
        let delete = move |at: Path| {
            let (inner, life) = (inner.clone(), life.clone());
            async move { life.whole(inner.delete(&at)).await.map(|()| at) }
        };
        places.and_then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.life.read() {
            Ok(()) => self.inner.list(prefix),
            Err(e) => futures::stream::iter([Err(e)]).boxed(),
        }
    }

    fn list_with_delimiter<'a, 'b, 'c>(&'a self, prefix: Option<&'b Path>) -> Answer<'c, ListResult>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        async move {
            self.life.read()?;
            self.inner.list_with_delimiter(prefix).await
        }
        .boxed()
    }

    fn copy_opts<'a, 'b, 'd, 'c>(&'a self, from: &'b Path, to: &'d Path, options: CopyOptions) -> Answer<'c, ()>
    where
        'a: 'c,
        'b: 'c,
        'd: 'c,
        Self: 'c,
    {
        self.life.whole(self.inner.copy_opts(from, to, options)).boxed()
    }

    fn rename_opts<'a, 'b, 'd, 'c>(&'a self, from: &'b Path, to: &'d Path, options: RenameOptions) -> Answer<'c, ()>
    where
        'a: 'c,
        'b: 'c,
        'd: 'c,
        Self: 'c,
    {
        self.life.whole(self.inner.rename_opts(from, to, options)).boxed()
    }
}

#[derive(Debug)]
struct DyingUpload {
    inner: Option<Box<dyn MultipartUpload>>, // always there until dropped
    life: Arc<Life>,
}

impl DyingUpload {
    fn inner(&mut self) -> &mut Box<dyn MultipartUpload> {
        self.inner.as_mut().unwrap()
    }
}

impl MultipartUpload for DyingUpload {
    fn put_part(&mut self, payload: PutPayload) -> UploadPart {
        match self.life.write() {
            Verdict::Do => self.inner().put_part(payload),
            Verdict::Die if self.life.death == Death::After => {
                let put = self.inner().put_part(payload);
                async move { put.await.and(Err(dead())) }.boxed()
            }
            Verdict::Die if self.life.death == Death::HalfPart => {
                let put = self.inner().put_part(half(&payload));
                async move { put.await.and(Err(dead())) }.boxed()
            }
            Verdict::Die | Verdict::Refuse => async { Err(dead()) }.boxed(),
        }
    }

    fn complete<'a, 'c>(&'a mut self) -> Answer<'c, PutResult>
    where
        'a: 'c,
        Self: 'c,
    {
        let life = self.life.clone();
        async move { life.whole(self.inner().complete()).await }.boxed()
    }

    fn abort<'a, 'c>(&'a mut self) -> Answer<'c, ()>
    where
        'a: 'c,
        Self: 'c,
    {
        let life = self.life.clone();
        async move { life.whole(self.inner().abort()).await }.boxed()
    }
}

impl Drop for DyingUpload {
    fn drop(&mut self) {
        // A killed process does not tidy up.
        if self.life.read().is_err() {
            std::mem::forget(self.inner.take());
        }
    }
}
