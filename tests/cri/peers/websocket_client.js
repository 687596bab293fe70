// A client of streams over a WebSocket, by npm's ws: {"url": …, "protocols": […], "send": […]} on its input.
//
// `send` are messages, {"binary": base64} or {"text": …}, sent once something has come. Prints one JSON object: {"status",
// "protocol", "messages": [{"binary": base64} | {"text": …}], "code"}, when the server has closed.
'use strict'

const WebSocket = require('ws')

const asked = JSON.parse(require('fs').readFileSync(0))
const result = { status: 0, protocol: '', messages: [], code: 0 }
let over = false
let sent = false

function finish () {
  if (over) return
  over = true
  process.stdout.write(JSON.stringify(result), () => process.exit(0))
}

setTimeout(finish, (asked.seconds || 20) * 1000).unref()
const socket = new WebSocket(asked.url.replace(/^http/, 'ws'), asked.protocols, { rejectUnauthorized: false })
socket.on('open', () => { result.status = 101; result.protocol = socket.protocol })
socket.on('unexpected-response', (request, response) => { result.status = response.statusCode; finish() })
socket.on('error', finish)
socket.on('close', code => { result.code = code; finish() })
socket.on('message', (data, binary) => {
  result.messages.push(binary ? { binary: data.toString('base64') } : { text: data.toString() })
  if (sent) return
  sent = true
  asked.send.forEach(message => {
    socket.send(message.text === undefined ? Buffer.from(message.binary, 'base64') : message.text)
  })
})
