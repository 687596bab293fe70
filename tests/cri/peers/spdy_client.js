// A client of streams over SPDY/3.1, by npm's spdy-transport: {"url": …, "protocols": […], "streams": […]} on its input.
//
// Each of `streams` is {"headers": {…}, "send": base64, "fin": true, "wait": "text"}: what is sent once "wait" has come
// on any stream (at once without it). Prints one JSON object: {"status", "protocol", "accepted", "streams": [{"data": base64,
// "ended": bool}]}, when all streams have ended or the connection has.
'use strict'

const net = require('net')
const tls = require('tls')
const transport = require('spdy-transport')

const asked = JSON.parse(require('fs').readFileSync(0))
const url = new URL(asked.url)
const result = { status: 0, protocol: '', accepted: [], streams: asked.streams.map(() => ({ data: [], ended: false })) }
let over = false

function finish () {
  if (over) return
  over = true
  result.streams.forEach(stream => { stream.data = Buffer.concat(stream.data).toString('base64') })
  process.stdout.write(JSON.stringify(result), () => process.exit(0))
}

setTimeout(finish, (asked.seconds || 20) * 1000).unref()

const secure = url.protocol === 'https:'
const socket = secure
  ? tls.connect({ host: url.hostname, port: url.port, rejectUnauthorized: false }, upgrade)
  : net.connect({ host: url.hostname, port: url.port }, upgrade)
socket.on('error', finish)
socket.on('close', () => setTimeout(finish, 50))

function upgrade () {
  const versions = asked.protocols.map(name => `X-Stream-Protocol-Version: ${name}\r\n`).join('')
  socket.write(`POST ${url.pathname} HTTP/1.1\r\nHost: ${url.host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n` +
    `${versions}Content-Length: 0\r\n\r\n`)
  let head = Buffer.alloc(0)
  socket.on('readable', function read () {
    for (let part; (part = socket.read()) !== null;) {
      head = Buffer.concat([head, part])
      const end = head.indexOf('\r\n\r\n')
      if (end < 0) continue
      socket.removeListener('readable', read)
      const lines = head.subarray(0, end).toString().split('\r\n')
      result.status = Number(lines[0].split(' ')[1])
      lines.forEach(line => {
        const at = line.indexOf(':')
        const name = line.substring(0, at).toLowerCase()
        if (name === 'x-stream-protocol-version') result.protocol = line.substring(at + 1).trim()
        if (name === 'x-accepted-stream-protocol-versions') result.accepted.push(line.substring(at + 1).trim())
      })
      if (result.status !== 101) return finish()
      const rest = head.subarray(end + 4)
      if (rest.length) socket.unshift(rest)
      return stream()
    }
  })
}

function stream () {
  const connection = transport.connection.create(socket, { protocol: 'spdy', isServer: false, autoSpdy31: false })
  connection.start(3.1)
  connection.on('error', finish)
  connection.on('close', () => setTimeout(finish, 50))
  const waiting = []
  const opened = asked.streams.map((wish, index) => connection.request({
    method: 'POST', host: 'localhost', path: '/', headers: wish.headers
  }, (error, it) => {
    if (error) return finish()
    // answers of Kubernetes' own servers have no :status, without which this library takes no answer
    if (asked.lenient) it._spdyState.needResponse = false
    it.on('error', () => {})
    it.on('response', () => {})
    it.on('data', data => {
      result.streams[index].data.push(data)
      const text = Buffer.concat(result.streams[index].data).toString('latin1')
      waiting.filter(each => text.includes(each.wish.wait)).forEach(each => {
        waiting.splice(waiting.indexOf(each), 1)
        say(each)
      })
    })
    it.on('end', () => {
      result.streams[index].ended = true
      if (result.streams.every(each => each.ended)) setTimeout(finish, 50)
    })
    it.resume()
    const each = { wish, it }
    if (wish.wait) waiting.push(each)
    else say(each)
  }))
  void opened
}

function say ({ wish, it }) {
  if (wish.send) it.write(Buffer.from(wish.send, 'base64'))
  if (wish.fin) it.end()
}
