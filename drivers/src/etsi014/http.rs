//! HTTP/1.1 (RFC 9112) as far as a key manager needs it: one request, one answer, in memory that is wiped.
//!
//! Libraries keep answers in buffers of their own, which nobody wipes; these answers are keys.

use std::{io, ops::Range};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::scratch::Scratch;

/// An answer. Its body is in the buffer that it was read to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Range<usize>,
    /// Whether the connection can serve another request.
    pub(super) stays_open: bool,
}

/// Sends a request and reads the answer to the start of `buffer`, which bounds its length.
pub(super) async fn exchange<S>(
    stream: &mut S,
    request: &[u8],
    buffer: &mut Scratch,
) -> io::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(request).await?;
    stream.flush().await?;
    let mut len = 0;
    loop {
        if len == buffer.len() {
            return Err(invalid("the answer is longer than its keys can be"));
        }
        let read = stream.read(&mut buffer[len..]).await?;
        len += read;
        if let Some(answer) = parse(&mut buffer[..len], read == 0)? {
            return Ok(answer);
        }
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// The answer, once all of it is there. `ended`: no more will come.
fn parse(bytes: &mut [u8], ended: bool) -> io::Result<Option<Answer>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(start) =
        head.parse(bytes).map_err(|_| invalid("no HTTP answer"))?
    else {
        return Ok(None);
    };
    let status = head.code.unwrap_or(0);
    let (mut length, mut chunked, mut close) = (None, false, head.version == Some(0));
    for header in head.headers.iter() {
        let value = str::from_utf8(header.value).unwrap_or("").trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            let told = value.parse::<usize>().ok();
            // Two lengths that differ are an attack on whoever takes one of them.
            if told.is_none() || length.is_some_and(|before| Some(before) != told) {
                return Err(invalid("no length that can be"));
            }
            length = told;
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err(invalid("a transfer coding that is not known"));
            }
            chunked = true;
        } else if header.name.eq_ignore_ascii_case("connection") {
            close |= value.eq_ignore_ascii_case("close");
        }
    }
    let stays_open = !close;
    let len = match (chunked, length) {
        (true, _) => {
            let Some(len) = join_chunks(&mut bytes[start..])? else {
                return Ok(None);
            };
            len
        }
        (false, Some(len)) => {
            if bytes.len() - start < len {
                return Ok(None);
            }
            len
        }
        (false, None) if ended => bytes.len() - start,
        (false, None) => return Ok(None),
    };
    Ok(Some(Answer {
        status,
        body: start..start + len,
        stays_open: stays_open && (chunked || length.is_some()),
    }))
}

/// Moves the chunks of a body together (RFC 9112, clause 7.1) once all are there, and tells their length.
fn join_chunks(body: &mut [u8]) -> io::Result<Option<usize>> {
    let bad = || invalid("a chunk that cannot be");
    // Looked through first: a body that is not whole stays as it is.
    let (mut at, mut chunks) = (0, Vec::new());
    loop {
        let parsed = httparse::parse_chunk_size(&body[at..]).map_err(|_| bad())?;
        let httparse::Status::Complete((head, size)) = parsed else {
            return Ok(None);
        };
        let size = usize::try_from(size).map_err(|_| bad())?;
        at += head;
        if size == 0 {
            break;
        }
        let end = at.checked_add(size).ok_or_else(bad)?;
        match body.get(end..end.saturating_add(2)) {
            None => return Ok(None),
            Some(b"\r\n") => {}
            Some(_) => return Err(bad()),
        }
        chunks.push(at..end);
        at = end + 2;
    }
    // Trailers would follow; a key manager has none to tell.
    match body.get(at..at + 2) {
        None => return Ok(None),
        Some(b"\r\n") => {}
        Some(_) => return Err(bad()),
    }
    let mut len = 0;
    for chunk in chunks {
        let size = chunk.len();
        body.copy_within(chunk, len);
        len += size;
    }
    Ok(Some(len))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &str) -> io::Result<Option<(u16, String, bool)>> {
        let mut bytes = text.as_bytes().to_vec();
        let answer = parse(&mut bytes, false)?;
        Ok(answer.map(|answer| {
            let body = String::from_utf8(bytes[answer.body].to_vec()).unwrap();
            (answer.status, body, answer.stays_open)
        }))
    }

    #[test]
    fn an_answer_of_known_length_is_whole_at_its_end_and_no_sooner() {
        let text = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        for len in 0..text.len() {
            assert_eq!(body(&text[..len]).unwrap(), None, "{len} bytes");
        }
        assert_eq!(body(text).unwrap(), Some((200, "hello".to_owned(), true)));
        let close = "HTTP/1.1 503 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(body(close).unwrap(), Some((503, String::new(), false)));
    }

    #[test]
    fn chunks_are_joined_once_all_are_there() {
        let text = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n";
        for len in 0..text.len() {
            assert_eq!(body(&text[..len]).unwrap(), None, "{len} bytes");
        }
        assert_eq!(body(text).unwrap(), Some((200, "hello".to_owned(), true)));
    }

    #[test]
    fn an_answer_without_length_ends_with_its_connection() {
        let mut bytes = b"HTTP/1.0 200 OK\r\n\r\nhello".to_vec();
        assert_eq!(parse(&mut bytes, false).unwrap(), None);
        let answer = parse(&mut bytes, true).unwrap().unwrap();
        assert_eq!(
            (&bytes[answer.body], answer.stays_open),
            (&b"hello"[..], false)
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for text in [
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nab\r\n",
        ] {
            assert!(body(text).is_err(), "{text}");
        }
    }
}
